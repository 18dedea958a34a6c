// Table input: a field and a slider for each feature.

import { byId, el, fill, place, typed } from "./dom.js";

/** @import { Example, Model } from "./service.js" */

// How far a slider goes beyond the range of the training data, in lengths of that range: a model
// should become unsure there.
const BEYOND = 0.5;
const STEPS = 200;

/** A form of features that calls ``changed`` after each change. */
export class TableInput {
	/**
	 * @param {Model} model
	 * @param {() => void} changed
	 */
	constructor(model, changed) {
		/** @type {HTMLInputElement[]} */
		this.boxes = [];
		/** @type {HTMLInputElement[]} */
		this.sliders = [];
		fill("input", "table-template");
		const examples = /** @type {HTMLSelectElement} */ (byId("examples"));
		examples.append(...model.examples.map((each, i) => el("option", { value: i }, said(each, i))));
		examples.addEventListener("change", () => {
			this.take(model.examples[Number(examples.value)]);
			changed();
		});
		const rows = this.names(model).map((name, d) => this.feature(model, name, d, changed));
		byId("features").append(...rows);
		byId("features").addEventListener("input", () => {
			// The row is no longer an example.
			examples.value = "";
		});
		this.take(model.examples[0]);
	}

	/** @param {Model} model */
	names({ input }) {
		const count = input.shape.reduce((product, length) => product * length, 1);
		return input.features.length
			? input.features
			: Array.from({ length: count }, (_, d) => `x${d}`);
	}

	/**
	 * @param {Model} model
	 * @param {string} name
	 * @param {number} d
	 * @param {() => void} changed
	 */
	feature(model, name, d, changed) {
		const [low, high] = (model.input.feature_ranges[d] ?? model.input.range).map(tidy);
		const length = high - low || Math.abs(high) || 1;
		const values = model.examples.map(({ input }) => input.flat(Infinity)[d]);
		const whole = [low, high, ...values].every(Number.isInteger);
		const step = whole ? 1 : 10 ** Math.floor(Math.log10(length / STEPS));
		const round = whole ? Math.round : tidy;
		const [from, to] = [round(low - BEYOND * length), round(high + BEYOND * length)];
		const box = el("input", { id: `feature-${d}`, inputmode: "decimal" });
		const slider = el("input", {
			...{ type: "range", min: from, max: to, step, "aria-label": `${name}, slider` },
		});
		slider.addEventListener("input", () => {
			box.value = String(tidy(Number(slider.value)));
			changed();
		});
		box.addEventListener("input", () => {
			slider.value = box.value;
			changed();
		});
		const trained = el("div", { class: "trained" });
		const at = (/** @type {number} */ x) => (x - from) / (to - from);
		this.boxes.push(box);
		this.sliders.push(slider);
		return el(
			"div",
			{ class: "feature" },
			el("label", { for: `feature-${d}` }, name),
			box,
			el("div", { class: "slide" }, slider, place(trained, at(low), at(high))),
			el("small", {}, `${low} to ${high}`),
		);
	}

	/** @param {Example} example */
	take(example) {
		/** @type {number[]} */
		const values = example.input.flat(Infinity);
		values.forEach((value, d) => {
			this.boxes[d].value = String(value);
			this.sliders[d].value = this.boxes[d].value;
		});
	}

	/** Return the row; text that is no number stays, for the service to refuse. */
	row() {
		return this.boxes.map(({ value }) => typed(value));
	}
}

/**
 * Drop digits that come from float32's rounding.
 * @param {number} x
 */
function tidy(x) {
	return Number(x.toPrecision(7));
}

/**
 * @param {Example} example
 * @param {number} i
 */
function said({ truth }, i) {
	return truth === null ? String(i + 1) : `${i + 1}: true answer ${truth}`;
}
