// How a model's images look, judged by its examples, and how to show one.

import { context } from "./dom.js";

/** @import { Model } from "./service.js" */
/** @import { Frame } from "./strokes.js" */

// Share of the range above which a pixel is part of the figure.
const MARKED = 0.15;
const THICKEST = 0.25;

/** Images of one model: sizes, colours, paper and ink. */
export class Images {
	/** @param {Model} model */
	constructor(model) {
		const { shape, range } = model.input;
		const [channels, rows, columns] = shape.length === 3 ? shape : [1, ...shape];
		this.channels = channels;
		this.rows = rows;
		this.columns = columns;
		/** @type {number[][]} */
		this.examples = model.examples.map(({ input }) => input.flat(Infinity));
		this.low = range[0];
		this.high = range[1];
		const border = this.examples.flatMap((values) => values.filter((_, i) => this.onBorder(i)));
		border.sort((a, b) => a - b);
		const middle = border[Math.floor(border.length / 2)];
		// The border is paper; ink is the other end of the range.
		this.paper = middle - this.low <= this.high - middle ? this.low : this.high;
		this.ink = this.paper === this.low ? this.high : this.low;
		this.whole = this.examples.every((values) => values.every(Number.isInteger));
		this.frame = this.extent();
	}

	/** @param {number} i */
	onBorder(i) {
		const [x, y] = [i % this.columns, Math.floor(i / this.columns) % this.rows];
		return x === 0 || y === 0 || x === this.columns - 1 || y === this.rows - 1;
	}

	/**
	 * Measure how much of the picture the tallest and the widest example fill, and how thick their
	 * lines are. A long line's area is its length times its thickness, its outline twice its length;
	 * counted along rows and columns, the outline is 4 / pi times as long on average.
	 * @returns {Frame}
	 */
	extent() {
		const { rows, columns } = this;
		let [height, width, area, outline] = [0, 0, 0, 0];
		for (const values of this.examples) {
			const mark = (/** @type {number} */ y, /** @type {number} */ x) =>
				y < 0 || x < 0 || y >= rows || x >= columns ? 0 : this.mark(values[y * columns + x]);
			const [ys, xs] = [new Set(), new Set()];
			for (let y = 0; y <= rows; y++) {
				for (let x = 0; x <= columns; x++) {
					const here = mark(y, x);
					area += here;
					outline += Math.abs(here - mark(y - 1, x)) + Math.abs(here - mark(y, x - 1));
					if (here > MARKED) {
						ys.add(y);
						xs.add(x);
					}
				}
			}
			height = Math.max(height, span(ys));
			width = Math.max(width, span(xs));
		}
		const line = (2 * area) / ((outline * Math.PI) / 4 || 1);
		return {
			height: (height || rows) / rows,
			width: (width || columns) / columns,
			line: Math.min(THICKEST, Math.max(1, line) / rows),
		};
	}

	/**
	 * Return how far a value is from paper (0) to ink (1).
	 * @param {number} value
	 */
	mark(value) {
		return (value - this.paper) / (this.ink - this.paper || 1);
	}

	/**
	 * Return the value with such a mark.
	 * @param {number} mark
	 */
	value(mark) {
		const exact = this.paper + mark * (this.ink - this.paper);
		return this.whole ? Math.round(exact) : Number(exact.toPrecision(4));
	}

	/**
	 * Lay one image over another: each pixel is the value farther from paper.
	 * @param {number[]} below
	 * @param {number[]} above
	 */
	over(below, above) {
		return below.map((value, i) => (this.mark(above[i]) > this.mark(value) ? above[i] : value));
	}

	blank() {
		return new Array(this.channels * this.rows * this.columns).fill(this.paper);
	}

	/**
	 * Show an image pixel by pixel; the style sheet enlarges it.
	 * @param {HTMLCanvasElement} canvas
	 * @param {number[]} values
	 */
	show(canvas, values) {
		const area = this.rows * this.columns;
		canvas.width = this.columns;
		canvas.height = this.rows;
		const pen = context(canvas);
		const image = pen.createImageData(this.columns, this.rows);
		for (let i = 0; i < area; i++) {
			for (let c = 0; c < 3; c++) {
				const value = values[this.channels >= 3 ? c * area + i : i];
				// One channel is ink on paper; three are colours, from dark to bright.
				const bright =
					this.channels >= 3
						? (value - this.low) / (this.high - this.low || 1)
						: 1 - this.mark(value);
				image.data[4 * i + c] = 255 * bright;
			}
			image.data[4 * i + 3] = 255;
		}
		pen.putImageData(image, 0, 0);
	}
}

/** @param {Set<number>} places */
function span(places) {
	return places.size ? Math.max(...places) - Math.min(...places) + 1 : 0;
}
