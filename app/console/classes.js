// The answer of a classification: classes with their passes, and what the doubt is made of.

import {
	el,
	head,
	normalReach,
	number,
	passes,
	place,
	reveal,
	Strip,
	share,
	terms,
} from "./dom.js";

/** @import { Answer, Model } from "./service.js" */

// More would not be looked at: of a thousand classes the likeliest.
const MOST_CLASSES = 20;

/**
 * Say in a sentence what came out.
 * @param {Answer} answer
 * @param {Model} model
 */
export function headline(answer, model) {
	const [label] = answer.labels;
	const mean = answer.mean[0][model.outputs.labels.indexOf(label)];
	const against = Math.round(answer.variation_ratio[0] * answer.passes);
	const others = against === 0 ? "all agree" : `${against} of them would say something else`;
	return `${label}, with ${share(mean)} on average over ${passes(answer.passes)}; ${others}.`;
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
	const { labels } = model.outputs;
	const [mean] = answer.mean;
	const shown = labels.map((_, c) => c);
	if (labels.length > MOST_CLASSES) {
		shown.sort((a, b) => mean[b] - mean[a]).splice(MOST_CLASSES);
	}
	const { samples } = answer;
	const strips = new Map(samples ? shown.map((c) => [c, new Strip()]) : []);
	const counter = el("span", { class: "counter" });
	root.replaceChildren(
		el(
			"table",
			{ class: "classes" },
			el("caption", {}, "Probability of each class, from 0 to 1 ", counter),
			head("Class", "Passes", "Mean"),
			el("tbody", {}, ...shown.map((c) => row(answer, labels[c], c, strips.get(c)))),
		),
		el("p", { class: "note" }, legend(answer, labels.length - shown.length)),
		entropies(answer, labels.length),
	);
	if (!samples) return () => {};
	for (const strip of strips.values()) strip.clear();
	return reveal(samples.length, atOnce, (from, to) => {
		for (let t = from; t < to; t++) {
			for (const [c, strip] of strips) strip.dot(t, samples[t][0][c], samples.length);
		}
		counter.textContent = `(pass ${to} of ${samples.length})`;
	});
}

/**
 * @param {Answer} answer
 * @param {number} left_out
 */
function legend({ interval, samples }, left_out) {
	const level = Math.round(100 * interval.level);
	const dots = samples ? "Dots: the passes, as they were drawn. " : "";
	const rest = left_out ? ` ${left_out} less likely classes are left out.` : "";
	return (
		`Bar: mean of the passes. Whisker: its ${level} % interval, in which the mean of many more ` +
		`passes would lie. ${dots}Shade: where ${level} % of the passes lie.${rest}`
	);
}

/**
 * @param {Answer} answer
 * @param {string} label
 * @param {number} c
 * @param {Strip | undefined} strip
 */
function row(answer, label, c, strip) {
	const [mean, error] = [answer.mean[0][c], answer.standard_error?.[0][c]];
	const [lower, upper] = [answer.interval.lower[0][c], answer.interval.upper[0][c]];
	const reach = normalReach(answer.interval.level) * (error ?? 0);
	const chart = el(
		"div",
		{ class: "chart", "aria-hidden": "true" },
		place(el("div", { class: "bar" }), 0, mean),
		place(el("div", { class: "whisker" }), mean - reach, mean + reach),
		place(el("div", { class: "band" }), lower, upper),
		strip?.canvas ?? "",
	);
	return el(
		"tr",
		{ class: label === answer.labels[0] ? "top" : "" },
		el("th", { scope: "row" }, label),
		el("td", {}, chart),
		el(
			"td",
			{ class: "number" },
			el("strong", {}, share(mean)),
			el("small", {}, error === undefined ? "" : ` ± ${share(error)}`),
			el("small", { class: "interval" }, `${share(lower)} to ${share(upper)}`),
		),
	);
}

/**
 * Show the predictive entropy in its two parts (Houlsby et al. 2011).
 * @param {Answer} answer
 * @param {number} classes
 */
function entropies(answer, classes) {
	const [all] = answer.predictive_entropy;
	const [data] = answer.expected_entropy;
	const most = Math.log(classes);
	return el(
		"div",
		{ id: "entropy" },
		el("h3", {}, "What it is unsure of"),
		el(
			"div",
			{ class: "chart parts", "aria-hidden": "true" },
			place(el("div", { class: "data" }), 0, data / most),
			place(el("div", { class: "model" }), data / most, all / most),
		),
		terms(
			["", "Predictive entropy", `${number(all)} of at most ${number(most)} nats`],
			["data", "Data: the passes are unsure themselves", number(data)],
			[
				...["model", "Model: the passes disagree (mutual information)"],
				number(answer.mutual_information[0]),
			],
		),
	);
}
