// The answer of a regression: the predictive distribution, and what its width is made of.

import { el, number, place, reveal, Strip, terms } from "./dom.js";

/** @import { Answer, Model } from "./service.js" */

const SVG = "http://www.w3.org/2000/svg";
const POINTS = 160;
const REACH = 3.5; // standard deviations to each side
// Of a mixture of more normals than this nobody sees the difference.
const MOST_NORMALS = 500;

/**
 * Say in a sentence what came out.
 * @param {Answer} answer
 * @param {Model} model
 */
export function headline(answer, model) {
	const texts = model.outputs.labels.map((_, c) => {
		const [mean, std] = [answer.mean[0][c], answer.total_std[0][c]];
		return `${named(model, c)}: ${number(mean)}, give or take ${number(std)}`;
	});
	return `${texts.join("; ")} (mean and standard deviation).`;
}

/**
 * Show an answer.
 * @param {HTMLElement} root
 * @param {Answer} answer
 * @param {Model} model
 * @param {boolean} atOnce whether passes appear all at once
 * @returns {() => void} ends what is still being drawn
 */
export function show(root, answer, model, atOnce) {
	const targets = model.outputs.labels.map((_, c) => new Target(answer, c));
	root.replaceChildren(...targets.map((target) => target.figure(named(model, target.c))));
	const { samples } = answer;
	if (!samples) return () => {};
	for (const { strip } of targets) strip.clear();
	return reveal(samples.length, atOnce, (from, to) => {
		for (const target of targets) target.dots(from, to);
	});
}

/**
 * The name of a target, and its unit where that is known.
 * @param {Model} model
 * @param {number} c
 */
function named({ outputs }, c) {
	return outputs.units ? `${outputs.labels[c]} (${outputs.units[c]})` : outputs.labels[c];
}

/** What the passes say of one target. */
class Target {
	/**
	 * @param {Answer} answer
	 * @param {number} c
	 */
	constructor(answer, c) {
		this.c = c;
		this.samples = answer.samples;
		this.level = Math.round(100 * answer.interval.level);
		this.mean = answer.mean[0][c];
		this.error = answer.standard_error?.[0][c];
		this.epistemic = answer.epistemic_std[0][c];
		this.aleatoric = answer.aleatoric_std[0][c];
		this.total = answer.total_std[0][c];
		this.lower = answer.interval.lower[0][c];
		this.upper = answer.interval.upper[0][c];
		this.from = Math.min(this.mean - REACH * this.total, this.lower);
		this.to = Math.max(this.mean + REACH * this.total, this.upper);
		this.strip = new Strip();
		this.counter = el("span", { class: "counter" });
	}

	/** @param {string} name */
	figure(name) {
		const { mean, error, epistemic, aleatoric } = this;
		const range = `${number(this.lower)} to ${number(this.upper)}`;
		const passes = this.samples ? [this.strip.canvas] : [];
		return el(
			"figure",
			{},
			el("figcaption", {}, `Where ${name} will lie, ${this.level} % of it shaded `, this.counter),
			el(
				"div",
				{ class: "density", role: "img", "aria-label": `Density around ${number(mean)}` },
				this.density(),
				place(el("div", { class: "middle" }), this.at(mean)),
			),
			el(
				"div",
				{ class: "ticks", "aria-hidden": "true" },
				...[this.lower, mean, this.upper].map((x) => place(el("span", {}, number(x)), this.at(x))),
			),
			el("p", { class: "note" }, "Model: the passes, and their standard deviation to each side"),
			el("div", { class: "chart" }, this.spread("model", epistemic), ...passes),
			el("p", { class: "note" }, "Data: the standard deviation of the noise around each pass"),
			el("div", { class: "chart" }, this.spread("data", aleatoric)),
			terms(
				["", "Mean of the passes", number(mean) + (error ? ` ± ${number(error)}` : "")],
				["", `${this.level} % interval of the value`, range],
				["model", "Model (epistemic standard deviation)", number(epistemic)],
				["data", "Data (aleatoric standard deviation)", number(aleatoric)],
				["", "Both together", number(this.total)],
			),
		);
	}

	/**
	 * Where a value stands in the figure, as a share of its width.
	 * @param {number} x
	 */
	at(x) {
		return (x - this.from) / (this.to - this.from || 1);
	}

	/**
	 * @param {string} kind
	 * @param {number} std
	 */
	spread(kind, std) {
		const bar = el("div", { class: `spread ${kind}` });
		return place(bar, this.at(this.mean - std), this.at(this.mean + std));
	}

	/** The curve, and what of it lies in the interval. */
	density() {
		const step = (this.to - this.from) / POINTS;
		const xs = Array.from({ length: POINTS + 1 }, (_, i) => this.from + step * i);
		const peak = Math.max(...xs.map((x) => this.dense(x)));
		const point = (/** @type {number} */ x, y = 1 - this.dense(x) / (peak || 1)) =>
			`${this.at(x).toFixed(4)},${y.toFixed(4)}`;
		const within = [this.lower, ...xs.filter((x) => x > this.lower && x < this.upper), this.upper];
		const area = [point(this.lower, 1), ...within.map((x) => point(x)), point(this.upper, 1)];
		const svg = document.createElementNS(SVG, "svg");
		svg.setAttribute("viewBox", "0 0 1 1");
		svg.setAttribute("preserveAspectRatio", "none");
		for (const [tag, points] of Object.entries({
			polygon: area,
			polyline: xs.map((x) => point(x)),
		})) {
			const shape = document.createElementNS(SVG, tag);
			shape.setAttribute("points", points.join(" "));
			svg.append(shape);
		}
		return svg;
	}

	/**
	 * The density of the predictive distribution: a normal of the noise around each pass; around
	 * their mean, with all the spread, where the passes are not shown.
	 * @param {number} x
	 */
	dense(x) {
		const { samples, c } = this;
		if (!samples || !this.aleatoric) return normal(x, this.mean, this.total);
		const step = Math.ceil(samples.length / MOST_NORMALS);
		let sum = 0;
		for (let t = 0; t < samples.length; t += step) {
			sum += normal(x, samples[t][0][c], this.aleatoric);
		}
		return sum;
	}

	/**
	 * Draw some of the passes.
	 * @param {number} from
	 * @param {number} to
	 */
	dots(from, to) {
		const { samples, c } = this;
		for (let t = from; t < to; t++) this.strip.dot(t, this.at(samples[t][0][c]), samples.length);
		this.counter.textContent = `(pass ${to} of ${samples.length})`;
	}
}

/**
 * A normal density, but for what does not depend on x.
 * @param {number} x
 * @param {number} mean
 * @param {number} std
 */
function normal(x, mean, std) {
	return Math.exp(-0.5 * ((x - mean) / (std || 1)) ** 2);
}
