// Drawn lines, and the pixels that a network sees of them.

import { context } from "./dom.js";

/** @typedef {[number, number]} Point x and y as shares of width and height, from the top left */
/** @typedef {Point[]} Stroke */
/** @typedef {{width: number, height: number, line: number}} Frame size of drawings, as shares
 * of the picture's width and height, and thickness of their lines, as a share of its height */

// Samples along each side of a pixel.
const FINENESS = 8;
// A smaller drawing is a dot, which scaling would turn into something else.
const DOT = 0.03;

/**
 * Centre lines and scale them to fill a frame, as data sets of digits do.
 * @param {Stroke[]} strokes
 * @param {Frame} frame
 * @param {number} aspect width of the picture over its height
 * @returns {Stroke[]}
 */
export function fitted(strokes, frame, aspect) {
	const points = strokes.flat();
	const [left, right] = ends(points.map(([x]) => x));
	const [top, bottom] = ends(points.map(([, y]) => y));
	// In units of the picture's height; lines keep their thickness.
	const [width, height] = [(right - left) * aspect, bottom - top];
	if (Math.max(width, height) < DOT) return strokes;
	const scale = Math.min(
		Math.max(0.1, frame.height - frame.line) / Math.max(height, 1e-6),
		Math.max(0.1, frame.width * aspect - frame.line) / Math.max(width, 1e-6),
	);
	return strokes.map((stroke) =>
		stroke.map(([x, y]) => [
			0.5 + (x - (left + right) / 2) * scale,
			0.5 + (y - (top + bottom) / 2) * scale,
		]),
	);
}

/** @param {number[]} values */
function ends(values) {
	return [Math.min(...values), Math.max(...values)];
}

/**
 * Draw lines on a canvas.
 * @param {CanvasRenderingContext2D} pen
 * @param {Stroke[]} strokes
 * @param {number} line thickness, as a share of the height
 */
export function trace(pen, strokes, line) {
	const { width, height } = pen.canvas;
	pen.lineWidth = line * height;
	pen.lineCap = "round";
	pen.lineJoin = "round";
	for (const [first, ...rest] of strokes) {
		pen.beginPath();
		pen.moveTo(first[0] * width, first[1] * height);
		// A line without length is drawn as a dot.
		for (const [x, y] of rest.length ? rest : [first]) pen.lineTo(x * width, y * height);
		pen.stroke();
	}
}

/**
 * Return the share of each pixel that lines cover.
 * @param {Stroke[]} strokes
 * @param {number} columns
 * @param {number} rows
 * @param {number} line thickness, as a share of the height
 * @returns {number[]} rows x columns shares, row by row
 */
export function coverage(strokes, columns, rows, line) {
	const canvas = document.createElement("canvas");
	canvas.width = columns * FINENESS;
	canvas.height = rows * FINENESS;
	const drawn = context(canvas);
	trace(drawn, strokes, line);
	const { data } = drawn.getImageData(0, 0, canvas.width, canvas.height);
	const covered = new Array(rows * columns).fill(0);
	for (let y = 0; y < canvas.height; y++) {
		for (let x = 0; x < canvas.width; x++) {
			const pixel = Math.floor(y / FINENESS) * columns + Math.floor(x / FINENESS);
			covered[pixel] += data[4 * (y * canvas.width + x) + 3] / 255 / FINENESS ** 2;
		}
	}
	return covered;
}
