// Dropout: its sites, a mask of each, and eval mode versus the mean of the passes.

import { byId, clone, context, counted, el, find, number, place, share, write } from "./dom.js";

/** @import { Answer, Model, Site } from "./service.js" */

const MOST_OUTPUTS = 10;
const CELLS_A_LINE = 32;

/**
 * Show a model's dropout.
 * @param {Model} model
 * @param {Answer} answer
 * @param {number[]} point eval mode's answer
 * @param {Answer | null} masks
 */
export function show(model, answer, point, masks) {
	const sites = model.sites.map((site, s) =>
		card(site, answer.sites?.[s].kept, masks?.sites[s].mask),
	);
	const none = "This network has no dropout: all passes are the same.";
	byId("sites").replaceChildren(...(sites.length ? sites : [none]));
	const double = model.sites.some(({ scaling, p }) => scaling === "double" && p > 0);
	byId("why-double").hidden = !double;
	byId("why-small").hidden = double;
	const gaps = answer.expectation_gap?.[0];
	byId("gap").textContent = summary(model, answer, point, gaps);
	byId("gaps").replaceChildren(...rows(model, answer, point, gaps));
	const { expectation_gap, expectation_gap_passes } = model.verification;
	byId("exported").textContent =
		`At export, over held-out rows: ${number(expectation_gap)} standard ` +
		`errors of the mean of ${counted(expectation_gap_passes)} (root mean square).`;
}

/**
 * @param {Site} site
 * @param {number | undefined} kept
 * @param {any[] | undefined} mask
 */
function card(site, kept, mask) {
	const shape = site.mask_shape.join(" × ");
	const about = `p = ${site.p}, scaling “${site.scaling}”, ${shape} units.`;
	const measured =
		kept === undefined
			? ""
			: ` Share kept, over all passes: ${share(kept)}; expected: ${share(1 - site.p)}.`;
	return el(
		"div",
		{},
		el("h3", {}, site.name),
		el("p", {}, about + measured),
		...(mask ? picture(mask.flat(Infinity)) : []),
	);
}

/**
 * Draw a mask, a cell for each unit.
 * @param {number[]} units
 */
function picture(units) {
	const kept = units.reduce((sum, unit) => sum + unit, 0);
	const said = `First pass: ${kept} of ${units.length} units kept`;
	const canvas = el("canvas", { class: "mask", role: "img", "aria-label": said });
	const width = Math.max(CELLS_A_LINE, Math.ceil(Math.sqrt(units.length)));
	canvas.width = Math.min(units.length, width);
	canvas.height = Math.ceil(units.length / width);
	const pen = context(canvas);
	const image = pen.createImageData(canvas.width, canvas.height);
	// Black, more or less opaque; the style sheet inverts it on a dark page.
	units.forEach((unit, i) => {
		image.data[4 * i + 3] = unit ? 255 : 40;
	});
	pen.putImageData(image, 0, 0);
	return [canvas, el("p", { class: "note" }, `${said} (filled).`)];
}

/**
 * Return how far eval mode is from the passes, comparably across outputs.
 * @param {Model} model
 * @param {Answer} answer
 * @param {number[]} point
 */
function distances({ task }, answer, point) {
	const classes = task === "classification";
	const unit = (/** @type {number} */ c) => (classes ? 1 : answer.total_std[0][c] || 1);
	return point.map((value, c) => Math.abs(answer.mean[0][c] - value) / unit(c));
}

/**
 * Return how to write an output: a probability, or a value to the precision of its mean.
 * @param {Model} model
 * @param {Answer} answer
 * @param {number} c
 * @returns {(x: number) => string}
 */
function writer({ task }, answer, c) {
	return task === "classification" ? share : (x) => number(x, answer.standard_error?.[0][c]);
}

/**
 * Say where eval mode is farthest from the passes.
 * @param {Model} model
 * @param {Answer} answer
 * @param {number[]} point
 * @param {number[] | undefined} gaps in standard errors
 */
function summary(model, answer, point, gaps) {
	const apart = distances(model, answer, point);
	const c = apart.indexOf(Math.max(...apart));
	const write = writer(model, answer, c);
	const what = model.task === "classification" ? "Class " : "";
	const far = gaps ? `, ${number(Math.abs(gaps[c]))} standard errors apart` : "";
	return (
		`${what}${model.outputs.labels[c]}: eval mode says ${write(point[c])}, ` +
		`the passes ${write(answer.mean[0][c])} on average${far}.`
	);
}

/**
 * Compare eval mode with the mean of the passes, for the outputs that are farthest apart.
 * @param {Model} model
 * @param {Answer} answer
 * @param {number[]} point
 * @param {number[] | undefined} gaps in standard errors
 */
function rows(model, answer, point, gaps) {
	const { labels } = model.outputs;
	const [mean] = answer.mean;
	const classes = model.task === "classification";
	const apart = distances(model, answer, point);
	const shown = labels
		.map((_, c) => c)
		.sort((a, b) => apart[b] - apart[a])
		.slice(0, MOST_OUTPUTS)
		.sort((a, b) => a - b);
	return shown.map((c) => {
		// For values: wide enough to show eval mode and four standard errors.
		const error = answer.standard_error?.[0][c] ?? 0;
		const reach = 1.2 * Math.max(Math.abs(mean[c] - point[c]), 4 * error) || 1;
		const at = (/** @type {number} */ x) => (classes ? x : 0.5 + (x - mean[c]) / (2 * reach));
		const [left, right] = [at(mean[c]), at(point[c])].sort((a, b) => a - b);
		const made = clone("gap-template");
		write(made, {
			label: labels[c],
			point: writer(model, answer, c)(point[c]),
			mean: writer(model, answer, c)(mean[c]),
			gap: gaps ? number(gaps[c]) : "",
		});
		place(find(made, ".between"), left, right);
		place(find(made, ".eval"), at(point[c]));
		place(find(made, ".mean"), at(mean[c]));
		return made;
	});
}
