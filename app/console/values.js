// The answer of a regression: the predictive distribution, and the parts of its width.

import { byId, clone, find, number, percent, place, reveal, Strip, write } from "./dom.js";

/** @import { Answer, Model } from "./service.js" */

const SVG = "http://www.w3.org/2000/svg";
const POINTS = 160;
// Standard deviations to each side of the mean, and of the interval.
const REACH = 3.5;
const MARGIN = 1;
// A mixture of more normals looks no different.
const MOST_NORMALS = 500;

/**
 * Sum an answer up in a sentence.
 * @param {Answer} answer
 * @param {Model} model
 */
export function headline(answer, model) {
	const texts = model.outputs.labels.map((_, c) => {
		const [mean, std] = [answer.mean[0][c], answer.total_std[0][c]];
		return `${named(model, c)}: ${number(mean, std)}, give or take ${number(std)}`;
	});
	return `${texts.join("; ")} (mean and standard deviation).`;
}

/**
 * Show an answer.
 * @param {Answer} answer
 * @param {Model} model
 * @param {boolean} atOnce whether passes appear all at once
 * @returns {() => void} stops the drawing under way
 */
export function show(answer, model, atOnce) {
	const targets = model.outputs.labels.map((_, c) => new Target(answer, named(model, c), c));
	byId("answer").replaceChildren(...targets.map((target) => target.figure));
	const { samples } = answer;
	if (!samples) return () => {};
	const strips = targets.map(({ figure }) => new Strip(find(figure, ".chart")));
	return reveal(samples.length, atOnce, (from, to) => {
		for (const { figure, c, at } of targets) {
			for (let t = from; t < to; t++) strips[c].dot(t, at(samples[t][0][c]), samples.length);
			write(figure, { counter: `(pass ${to} of ${samples.length})` });
		}
	});
}

/**
 * Return a target's name, with its unit if known.
 * @param {Model} model
 * @param {number} c
 */
function named({ outputs }, c) {
	return outputs.units ? `${outputs.labels[c]} (${outputs.units[c]})` : outputs.labels[c];
}

/** The figure of one target. */
class Target {
	/**
	 * @param {Answer} answer
	 * @param {string} name
	 * @param {number} c
	 */
	constructor(answer, name, c) {
		this.c = c;
		this.samples = answer.samples;
		const [mean, total] = [answer.mean[0][c], answer.total_std[0][c]];
		const [lower, upper] = [answer.interval.lower[0][c], answer.interval.upper[0][c]];
		const [epistemic, aleatoric] = [answer.epistemic_std[0][c], answer.aleatoric_std[0][c]];
		const error = answer.standard_error?.[0][c];
		this.mean = mean;
		this.total = total;
		this.aleatoric = aleatoric;
		this.from = Math.min(mean - REACH * total, lower - MARGIN * total);
		this.to = Math.max(mean + REACH * total, upper + MARGIN * total);
		this.figure = clone("value-template");
		write(this.figure, {
			name,
			level: percent(answer.interval.level),
			mean: number(mean, total) + (error ? ` ± ${number(error)}` : ""),
			lower: number(lower, total),
			upper: number(upper, total),
			epistemic: number(epistemic),
			aleatoric: number(aleatoric),
			total: number(total),
		});
		const [below, above] = this.figure.querySelectorAll(".ticks span");
		place(/** @type {HTMLElement} */ (below), this.at(lower));
		place(/** @type {HTMLElement} */ (above), this.at(upper));
		place(find(this.figure, ".middle"), this.at(mean));
		const spread = (/** @type {string} */ kind, /** @type {number} */ std) =>
			place(find(this.figure, `.spread.${kind}`), this.at(mean - std), this.at(mean + std));
		spread("model", epistemic);
		spread("data", aleatoric);
		find(this.figure, ".density").append(this.density(lower, upper));
	}

	/**
	 * Return a value's place in the figure, as a share of its width.
	 * @param {number} x
	 */
	at = (x) => (x - this.from) / (this.to - this.from || 1);

	/**
	 * The curve, and what of it lies in the interval.
	 * @param {number} lower
	 * @param {number} upper
	 */
	density(lower, upper) {
		const step = (this.to - this.from) / POINTS;
		const xs = Array.from({ length: POINTS + 1 }, (_, i) => this.from + step * i);
		const peak = Math.max(...xs.map((x) => this.dense(x)));
		const point = (/** @type {number} */ x, y = 1 - this.dense(x) / (peak || 1)) =>
			`${this.at(x).toFixed(4)},${y.toFixed(4)}`;
		const within = [lower, ...xs.filter((x) => x > lower && x < upper), upper];
		const area = [point(lower, 1), ...within.map((x) => point(x)), point(upper, 1)];
		const svg = document.createElementNS(SVG, "svg");
		svg.setAttribute("viewBox", "0 0 1 1");
		svg.setAttribute("preserveAspectRatio", "none");
		const shapes = { polygon: area, polyline: xs.map((x) => point(x)) };
		for (const [tag, points] of Object.entries(shapes)) {
			const shape = document.createElementNS(SVG, tag);
			shape.setAttribute("points", points.join(" "));
			svg.append(shape);
		}
		return svg;
	}

	/**
	 * Return the predictive density, up to a factor: a normal of the noise around each pass; where
	 * the passes are not shown, one of the total spread around their mean.
	 * @param {number} x
	 */
	dense(x) {
		const { samples, c } = this;
		if (!samples) return normal(x, this.mean, this.total);
		// Narrower noise would fall between the curve's points.
		const std = Math.max(this.aleatoric, (this.to - this.from) / POINTS);
		const every = Math.ceil(samples.length / MOST_NORMALS);
		let sum = 0;
		for (let t = 0; t < samples.length; t += every) sum += normal(x, samples[t][0][c], std);
		return sum;
	}
}

/**
 * A normal density without its constant factor.
 * @param {number} x
 * @param {number} mean
 * @param {number} std
 */
function normal(x, mean, std) {
	return Math.exp(-0.5 * ((x - mean) / (std || 1)) ** 2);
}
