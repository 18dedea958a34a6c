// Elements, readable numbers, and the strip of dots.

const REVEAL_MS = 700;
const DOT_RADIUS = 2;
// The fractional parts of its multiples are evenly spread, however many there are (Weyl 1916).
const GOLDEN = 0.6180339887498949;

/**
 * Make an element. Names from outside become text, never HTML.
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag
 * @param {Object<string, any>} properties attributes, "class" and "aria-..." included
 * @param {(Node | string)[]} children
 * @returns {HTMLElementTagNameMap[T]}
 */
export function el(tag, properties = {}, ...children) {
	const made = document.createElement(tag);
	for (const [name, value] of Object.entries(properties)) made.setAttribute(name, String(value));
	made.append(...children);
	return made;
}

/**
 * Return the element with an id.
 * @param {string} id
 */
export function byId(id) {
	return /** @type {HTMLElement} */ (document.getElementById(id));
}

/**
 * Replace an element's content by a copy of a template.
 * @param {string} id the element's
 * @param {string} template
 */
export function fill(id, template) {
	const { content } = /** @type {HTMLTemplateElement} */ (byId(template));
	byId(id).replaceChildren(content.cloneNode(true));
}

/**
 * Return a canvas's drawing context.
 * @param {HTMLCanvasElement} canvas
 */
export function context(canvas) {
	// Pixels are read back as the network's input, so a canvas on a GPU gains nothing.
	return /** @type {CanvasRenderingContext2D} */ (
		canvas.getContext("2d", { willReadFrequently: true })
	);
}

/**
 * Position an element along its parent's width.
 * @param {HTMLElement} element
 * @param {number} from share of the width
 * @param {number} [to] its end, if it has a length
 */
export function place(element, from, to) {
	element.style.left = `${100 * Math.min(1, Math.max(0, from))}%`;
	if (to !== undefined)
		element.style.width = `${100 * Math.max(0, Math.min(1, to) - Math.max(0, from))}%`;
	return element;
}

/**
 * Copy a template's only element.
 * @param {string} template
 */
export function clone(template) {
	const { content } = /** @type {HTMLTemplateElement} */ (byId(template));
	return /** @type {HTMLElement} */ (content.firstElementChild?.cloneNode(true));
}

/**
 * Return an element's first descendant that matches a selector.
 * @param {HTMLElement} root
 * @param {string} selector
 */
export function find(root, selector) {
	return /** @type {HTMLElement} */ (root.querySelector(selector));
}

/**
 * Write texts into those of an element's descendants that name them in ``data-is``.
 * @param {HTMLElement} root
 * @param {Object<string, string>} texts
 */
export function write(root, texts) {
	for (const [name, text] of Object.entries(texts)) {
		for (const at of root.querySelectorAll(`[data-is="${name}"]`)) at.textContent = text;
	}
}

/**
 * Return the typed number; other text unchanged, for the service to refuse.
 * @param {string} text
 */
export function typed(text) {
	const x = Number(text);
	return text.trim() === "" || !Number.isFinite(x) ? text.trim() : x;
}

/**
 * Write a share in percent; a share below 1 is not rounded to 100.
 * @param {number} part
 */
export function percent(part) {
	return `${Number((100 * part).toPrecision(6))} %`;
}

/**
 * Write a number to three digits of ``step``, say of a value's spread: the mean of prices near
 * 100,000 may need its last digits.
 * @param {number | null | undefined} x
 * @param {number | null} [step] the number itself by default
 */
export function number(x, step) {
	if (x === null || x === undefined) return "unknown";
	const size = step || Math.abs(x) || 1;
	const unit = 10 ** (Math.floor(Math.log10(size)) - 2);
	const rounded = Number((Math.round(x / unit) * unit).toPrecision(12));
	const plain = x === 0 || step || (size >= 1e-3 && size < 1e6);
	return (plain ? String(rounded) : x.toExponential(1)).replaceAll("-", "−");
}

/**
 * Write how many passes there are.
 * @param {number} count
 */
export function counted(count) {
	return count === 1 ? "1 pass" : `${count} passes`;
}

/**
 * Write a probability.
 * @param {number} p
 */
export function share(p) {
	return p > 0 && p < 0.0005 ? "< 0.001" : p.toFixed(3);
}

/**
 * Return the z such that a normal variable is within -z and z with probability ``level``.
 *
 * Winitzki (2008), A handy approximation for the error function and its inverse; off by 0.2 % at
 * most, less than a pixel.
 * @param {number} level
 */
export function normalReach(level) {
	const a = 0.147;
	const log = Math.log(1 - level * level);
	const half = 2 / (Math.PI * a) + log / 2;
	return Math.SQRT2 * Math.sqrt(Math.sqrt(half * half - log / a) - half);
}

/**
 * Draw passes one after the other within a second; all at once for users who prefer reduced
 * motion.
 * @param {number} count
 * @param {boolean} atOnce
 * @param {(from: number, to: number) => void} draw
 * @returns {() => void} stops it
 */
export function reveal(count, atOnce, draw) {
	if (atOnce || matchMedia("(prefers-reduced-motion: reduce)").matches) {
		draw(0, count);
		return () => {};
	}
	const begin = performance.now();
	let shown = 0;
	/** @param {number} now */
	const step = (now) => {
		const due = Math.min(count, Math.max(shown, Math.ceil((count * (now - begin)) / REVEAL_MS)));
		draw(shown, due);
		shown = due;
		if (shown < count) frame = requestAnimationFrame(step);
	};
	let frame = requestAnimationFrame(step);
	return () => cancelAnimationFrame(frame);
}

/** A canvas with a dot for each pass: along it is the value, its height means nothing. */
export class Strip {
	/** @param {HTMLElement} parent element to cover, already on the page */
	constructor(parent) {
		const canvas = el("canvas", { class: "strip" });
		parent.append(canvas);
		const { clientWidth, clientHeight } = canvas;
		canvas.width = clientWidth * devicePixelRatio;
		canvas.height = clientHeight * devicePixelRatio;
		this.context = context(canvas);
		this.context.scale(devicePixelRatio, devicePixelRatio);
		this.context.fillStyle = getComputedStyle(canvas).color;
		this.width = clientWidth - 2 * DOT_RADIUS;
		this.height = clientHeight - 2 * DOT_RADIUS;
	}

	/**
	 * @param {number} pass
	 * @param {number} at share of the width
	 * @param {number} count passes in all; the more, the fainter the dots
	 */
	dot(pass, at, count) {
		const { context, width, height } = this;
		context.globalAlpha = Math.max(0.08, Math.min(0.7, 40 / count));
		context.beginPath();
		const x = DOT_RADIUS + Math.min(1, Math.max(0, at)) * width;
		context.arc(x, DOT_RADIUS + ((pass * GOLDEN) % 1) * height, DOT_RADIUS, 0, 2 * Math.PI);
		context.fill();
	}
}
