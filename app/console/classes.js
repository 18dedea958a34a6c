// The answer of a classification: classes with their passes, and the sources of uncertainty.

import {
	byId,
	clone,
	counted,
	fill,
	find,
	normalReach,
	number,
	percent,
	place,
	reveal,
	Strip,
	share,
	write,
} from "./dom.js";

/** @import { Answer, Model } from "./service.js" */

// Of a thousand classes nobody reads more than the likeliest.
const MOST_CLASSES = 20;

/**
 * Sum an answer up in a sentence.
 * @param {Answer} answer
 * @param {Model} model
 */
export function headline(answer, model) {
	const [label] = answer.labels;
	const c = model.outputs.labels.indexOf(label);
	// Not the variation ratio: the class that most passes name may be another.
	const against = answer.samples?.filter((/** @type {number[][]} */ [sample]) =>
		sample.some((value) => value > sample[c]),
	).length;
	let others = "";
	if (answer.samples && answer.passes > 1) {
		others = against ? `; ${against} of them say otherwise` : "; all agree";
	}
	const mean = share(answer.mean[0][c]);
	return `${label}, with ${mean} on average over ${counted(answer.passes)}${others}.`;
}

/**
 * Show an answer.
 * @param {Answer} answer
 * @param {Model} model
 * @param {boolean} atOnce whether passes appear all at once
 * @returns {() => void} stops the drawing under way
 */
export function show(answer, model, atOnce) {
	fill("answer", "classes-template");
	const root = byId("answer");
	const { samples } = answer;
	const { labels } = model.outputs;
	const [mean] = answer.mean;
	const order = labels.map((_, c) => c);
	if (labels.length > MOST_CLASSES) order.sort((a, b) => mean[b] - mean[a]);
	const shown = order.slice(0, MOST_CLASSES);
	const rows = shown.map((c) => row(answer, labels[c], c));
	find(root, "tbody").append(...rows);
	const rest = labels.length - shown.length;
	write(root, {
		level: percent(answer.interval.level),
		dots: samples ? "Dots: the passes." : "",
		rest: rest ? `${rest} less likely classes are left out.` : "",
	});
	showEntropies(answer, labels.length);
	if (!samples) return () => {};
	const strips = rows.map((each) => new Strip(find(each, ".chart")));
	return reveal(samples.length, atOnce, (from, to) => {
		for (let t = from; t < to; t++) {
			shown.forEach((c, i) => {
				strips[i].dot(t, samples[t][0][c], samples.length);
			});
		}
		write(root, { counter: `(pass ${to} of ${samples.length})` });
	});
}

/**
 * @param {Answer} answer
 * @param {string} label
 * @param {number} c
 */
function row(answer, label, c) {
	const [mean, error] = [answer.mean[0][c], answer.standard_error?.[0][c]];
	const [lower, upper] = [answer.interval.lower[0][c], answer.interval.upper[0][c]];
	const reach = normalReach(answer.interval.level) * (error ?? 0);
	const made = clone("class-template");
	made.classList.toggle("top", label === answer.labels[0]);
	write(made, {
		label,
		mean: share(mean),
		error: error === undefined ? "" : ` ± ${share(error)}`,
		interval: `${share(lower)} to ${share(upper)}`,
	});
	place(find(made, ".bar"), 0, mean);
	place(find(made, ".whisker"), mean - reach, mean + reach);
	place(find(made, ".band"), lower, upper);
	return made;
}

/**
 * Show the two parts of the predictive entropy (Houlsby et al. 2011).
 * @param {Answer} answer
 * @param {number} classes
 */
function showEntropies(answer, classes) {
	const [all] = answer.predictive_entropy;
	const [data] = answer.expected_entropy;
	const most = Math.log(classes);
	const root = byId("entropy");
	place(find(root, ".chart .data"), 0, data / most);
	place(find(root, ".chart .model"), data / most, all / most);
	write(root, {
		all: `${number(all)} of at most ${number(most)} nats`,
		data: number(data),
		model: number(answer.mutual_information[0]),
	});
}
