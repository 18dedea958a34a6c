// Image input: a drawing, an example, or a preset that should fool the network.

import { byId, context, el, fill } from "./dom.js";
import { Images } from "./pixels.js";
import { coverage, fitted, trace } from "./strokes.js";

/** @import { Model } from "./service.js" */
/** @import { Point, Stroke } from "./strokes.js" */

const SIDE = 256; // of the drawing area, in its own pixels
const PEN_STEP = 1 / 32;
/** @type {Stroke[]} An A. */
const LETTER = [
	[
		[0.2, 0.9],
		[0.5, 0.1],
		[0.8, 0.9],
	],
	[
		[0.32, 0.62],
		[0.68, 0.62],
	],
];
/** @type {Object<string, Point>} */
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** A drawing area that calls ``changed`` after each change. */
export class Drawing {
	/**
	 * @param {Model} model
	 * @param {() => void} changed
	 */
	constructor(model, changed) {
		this.model = model;
		this.images = new Images(model);
		this.changed = changed;
		/** @type {number[] | null} The image below the strokes; on null, blank paper, they are fitted. */
		this.base = null;
		/** @type {Stroke[]} */
		this.strokes = [];
		/** @type {Map<number | "keys", Stroke>} Strokes under way, by pointer or keyboard. */
		this.begun = new Map();
		/** @type {Point} The keyboard's pen. */
		this.pen = [0.5, 0.5];
		this.tries = 0;
		fill("input", "drawing-template");
		const { rows, columns } = this.images;
		this.canvas = /** @type {HTMLCanvasElement} */ (byId("drawing"));
		this.canvas.width = Math.round((SIDE * columns) / rows);
		this.canvas.height = SIDE;
		this.seen = /** @type {HTMLCanvasElement} */ (byId("seen"));
		byId("size").textContent = `It sees ${columns} × ${rows}`;
		// Ink on paper is inverted on a dark page.
		byId("input").classList.toggle("ink", this.images.channels < 3);
		model.examples.forEach(({ truth }, i) => {
			const picture = el("canvas", { class: "picture pixels", "aria-hidden": "true" });
			this.images.show(picture, this.images.examples[i]);
			const said = truth === null ? "" : `: ${truth}`;
			this.button("examples", `Example ${i + 1}${said}`, picture, () => this.take(i));
		});
		this.button("presets", "Blank", "Blank", () => this.put(null, "Nothing at all."));
		this.button("presets", "Noise", "Noise", () =>
			this.put(this.noise(), "Every pixel at random."),
		);
		this.button("presets", "Two overlaid", "Two overlaid", () => this.overlay());
		this.button("presets", "A letter", "A letter", () =>
			this.put(null, "An A, drawn like a digit.", LETTER),
		);
		this.listen();
		this.take(0);
	}

	/** Return the row that is drawn. */
	row() {
		const { images, strokes, base } = this;
		if (!strokes.length) return base ?? images.blank();
		const { columns, rows, channels } = images;
		const lines = base ? strokes : fitted(strokes, images.frame, columns / rows);
		const plane = coverage(lines, columns, rows, images.frame.line).map((mark) =>
			images.value(mark),
		);
		const drawn = Array.from({ length: channels }, () => plane).flat();
		return base ? images.over(base, drawn) : drawn;
	}

	/**
	 * @param {string} group
	 * @param {string} name
	 * @param {Node | string} content
	 * @param {() => void} act
	 */
	button(group, name, content, act) {
		const made = el("button", { type: "button", "aria-label": name, title: name }, content);
		made.addEventListener("click", () => {
			act();
			this.changed();
		});
		byId(group).append(made);
	}

	/** @param {number} i */
	take(i) {
		const { truth } = this.model.examples[i];
		this.put(
			this.images.examples[i],
			truth === null ? "" : `True answer: ${truth}. Draw on it to change it.`,
		);
	}

	/** Overlay two examples of different classes, another pair each time. */
	overlay() {
		const truths = this.model.examples.map(({ truth }) => String(truth ?? "?"));
		const count = truths.length;
		const first = this.tries++ % count;
		const others = truths.map((_, i) => (first + Math.ceil(count / 2) + i) % count);
		const second = others.find((i) => truths[i] !== truths[first]) ?? others[0];
		const { examples } = this.images;
		const said = `${truths[first]} and ${truths[second]}, overlaid.`;
		this.put(this.images.over(examples[first], examples[second]), said);
	}

	/** Return another image each time, but the same series after each page load. */
	noise() {
		let state = ++this.tries;
		return this.images.blank().map(() => {
			// Lehmer's generator with the multiplier of Park and Miller (1988).
			state = (48271 * state) % 2147483647;
			return this.images.value(state / 2147483647);
		});
	}

	/**
	 * @param {number[] | null} base
	 * @param {string} said
	 * @param {Stroke[]} strokes
	 */
	put(base, said, strokes = []) {
		this.base = base;
		this.strokes = structuredClone(strokes);
		this.begun.clear();
		byId("truth").textContent = said;
		byId("pen").textContent = "";
		this.refresh();
	}

	/** Show the drawing, and what the network sees of it. */
	refresh() {
		const pen = context(this.canvas);
		const { width, height } = this.canvas;
		pen.clearRect(0, 0, width, height);
		if (this.base) {
			const below = el("canvas");
			this.images.show(below, this.base);
			pen.imageSmoothingEnabled = false;
			pen.drawImage(below, 0, 0, width, height);
		} else {
			pen.fillStyle = "#fff";
			pen.fillRect(0, 0, width, height);
		}
		pen.strokeStyle = this.base ? "#0b62c4" : "#000";
		trace(pen, this.strokes, this.images.frame.line);
		if (document.activeElement === this.canvas && this.canvas.matches(":focus-visible")) {
			pen.strokeStyle = this.begun.has("keys") ? "#c4320b" : "#0b62c4";
			pen.lineWidth = 3;
			pen.beginPath();
			pen.arc(this.pen[0] * width, this.pen[1] * height, 8, 0, 2 * Math.PI);
			pen.stroke();
		}
		this.images.show(this.seen, this.row());
	}

	listen() {
		const { canvas } = this;
		const point = (/** @type {PointerEvent} */ event) => {
			const box = canvas.getBoundingClientRect();
			return /** @type {Point} */ ([
				(event.clientX - box.left) / box.width,
				(event.clientY - box.top) / box.height,
			]);
		};
		canvas.addEventListener("pointerdown", (event) => {
			if (event.button !== 0) return;
			canvas.setPointerCapture(event.pointerId);
			this.begin(event.pointerId, point(event));
		});
		canvas.addEventListener("pointermove", (event) => {
			// An event of a fast movement may stand for several points.
			const steps = event.getCoalescedEvents?.() ?? [];
			this.draw(event.pointerId, (steps.length ? steps : [event]).map(point));
		});
		canvas.addEventListener("lostpointercapture", (event) => {
			this.begun.delete(event.pointerId);
		});
		canvas.addEventListener("keydown", (event) => this.move(event));
		canvas.addEventListener("focus", () => this.refresh());
		canvas.addEventListener("blur", () => this.refresh());
	}

	/**
	 * @param {number | "keys"} who
	 * @param {Point[]} points
	 */
	draw(who, points) {
		const stroke = this.begun.get(who);
		if (!stroke) return;
		stroke.push(...points);
		this.refresh();
		this.changed();
	}

	/**
	 * @param {number | "keys"} who
	 * @param {Point} at
	 */
	begin(who, at) {
		const stroke = [at];
		this.begun.set(who, stroke);
		this.strokes.push(stroke);
		byId("truth").textContent = this.base ? "Drawn on." : "";
		this.refresh();
		this.changed();
	}

	/** @param {KeyboardEvent} event */
	move(event) {
		if (event.key === " ") {
			if (!this.begun.delete("keys")) this.begin("keys", [...this.pen]);
		} else if (event.key in ARROWS) {
			const [dx, dy] = ARROWS[event.key];
			this.pen = [within(this.pen[0] + dx * PEN_STEP), within(this.pen[1] + dy * PEN_STEP)];
			this.draw("keys", [[...this.pen]]);
			this.refresh();
		} else {
			return;
		}
		event.preventDefault();
		const [x, y] = this.pen.map((share) => Math.round(100 * share));
		byId("pen").textContent =
			`Pen ${this.begun.has("keys") ? "down" : "up"}, ${x} % from the left, ${y} % from the top`;
	}
}

/** @param {number} share */
function within(share) {
	return Math.min(1, Math.max(0, share));
}
