// What the images of a model look like, told from its examples; and how to show one.

import { context } from "./dom.js";

/** @import { Model } from "./service.js" */
/** @import { Frame } from "./strokes.js" */

// Share of the range from which on a pixel is part of what is depicted.
const MARKED = 0.15;
const THICKEST = 0.25;

/** Images of one model: sizes, colours, and what their paper and ink are. */
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
		// Drawn is with whatever the border is not.
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
	 * How much of the picture the examples fill, the highest and the widest, and how thick their
	 * lines are: of a long line the area is its length times that, the outline twice its length. The
	 * outline is counted along rows and columns, which is 4 / pi of what it is, on average.
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
	 * How far a value is from paper: 0, to 1 for ink.
	 * @param {number} value
	 */
	mark(value) {
		return (value - this.paper) / (this.ink - this.paper || 1);
	}

	/**
	 * The value of a pixel that is marked so far.
	 * @param {number} mark
	 */
	value(mark) {
		const exact = this.paper + mark * (this.ink - this.paper);
		return this.whole ? Math.round(exact) : Number(exact.toPrecision(4));
	}

	/**
	 * Lay one image over another: of each pixel what is farther from paper.
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
	 * Show an image, a pixel a point; the style sheet makes it larger.
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
				// One channel is ink on paper; of three each is a colour, from dark to bright.
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
