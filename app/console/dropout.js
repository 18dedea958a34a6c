// The dropout itself: its sites, a mask of each, and eval mode against the mean of the passes.

import { byId, context, el, head, number, passes, place, share } from "./dom.js";

/** @import { Answer, Model, Site } from "./service.js" */

const MOST_OUTPUTS = 10;
const CELLS_A_LINE = 32;

/**
 * Show all that is known of a model's dropout.
 * @param {Model} model
 * @param {Answer} answer
 * @param {number[]} point eval mode's answer
 * @param {Answer | null} masks
 */
export function show(model, answer, point, masks) {
	const sites = model.sites.map((site, s) =>
		card(site, answer.sites?.[s].kept, masks?.sites[s].mask),
	);
	const none = "This network has no dropout: all passes are alike.";
	byId("sites").replaceChildren(...(sites.length ? sites : [none]));
	const double = model.sites.some(({ scaling, p }) => scaling === "double" && p > 0);
	byId("why-double").hidden = !double;
	byId("why-small").hidden = double;
	const gaps = answer.expectation_gap?.[0];
	byId("gap").textContent = summary(model, answer.mean[0], point, gaps);
	byId("gaps").replaceChildren(table(model, answer, point, gaps));
	const { expectation_gap, expectation_gap_passes } = model.verification;
	byId("exported").textContent =
		`When the model was exported, over held-out rows: ${number(expectation_gap)} standard ` +
		`errors of the mean of ${passes(expectation_gap_passes)} (root mean square).`;
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
			: ` Kept in all passes: ${kept.toFixed(3)}, expected: ${share(1 - site.p)}.`;
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
	// Black, more or less opaque: the style sheet turns it round where all is dark.
	units.forEach((unit, i) => {
		image.data[4 * i + 3] = unit ? 255 : 40;
	});
	pen.putImageData(image, 0, 0);
	return [canvas, el("p", { class: "note" }, `${said} (filled).`)];
}

/**
 * Say where eval mode is farthest from the passes.
 * @param {Model} model
 * @param {number[]} mean
 * @param {number[]} point
 * @param {number[] | undefined} gaps in standard errors
 */
function summary({ task, outputs }, mean, point, gaps) {
	const apart = mean.map((value, c) => Math.abs(value - point[c]));
	const c = apart.indexOf(Math.max(...apart));
	const [what, write] = task === "classification" ? ["Class ", share] : ["", number];
	const far = gaps ? `, ${number(Math.abs(gaps[c]))} standard errors apart` : "";
	return `${what}${outputs.labels[c]}: eval mode says ${write(point[c])}, the passes ${write(mean[c])} on average${far}.`;
}

/**
 * @param {Model} model
 * @param {Answer} answer
 * @param {number[]} point
 * @param {number[] | undefined} gaps in standard errors
 */
function table({ task, outputs }, answer, point, gaps) {
	const [mean] = answer.mean;
	const classes = task === "classification";
	const apart = (/** @type {number} */ c) => Math.abs(mean[c] - point[c]);
	const shown = outputs.labels
		.map((_, c) => c)
		.sort((a, b) => apart(b) - apart(a))
		.slice(0, MOST_OUTPUTS)
		.sort((a, b) => a - b);
	const rows = shown.map((c) => {
		// Of values: so much to each side of the mean that eval mode, or what is by chance, is seen.
		const reach = 1.2 * Math.max(apart(c), 4 * (answer.standard_error?.[0][c] ?? 0)) || 1;
		const at = (/** @type {number} */ x) => (classes ? x : 0.5 + (x - mean[c]) / (2 * reach));
		const [left, right] = [at(mean[c]), at(point[c])].sort((a, b) => a - b);
		const chart = el(
			"div",
			{ class: "chart gap", "aria-hidden": "true" },
			place(el("div", { class: "between" }), left, right),
			place(el("div", { class: "mark eval" }), at(point[c])),
			place(el("div", { class: "mark mean" }), at(mean[c])),
		);
		const numbers = [point[c], mean[c], ...(gaps ? [gaps[c]] : [])];
		return el(
			"tr",
			{},
			el("th", { scope: "row" }, outputs.labels[c]),
			el("td", {}, chart),
			...numbers.map((x) => el("td", { class: "number" }, number(x))),
		);
	});
	const heads = [classes ? "Class" : "Target", "Apart", "Eval mode", "Passes"];
	if (gaps) heads.push("Gap");
	return el(
		"table",
		{},
		el(
			"caption",
			{},
			el("span", { class: "key eval" }),
			"eval mode ",
			el("span", { class: "key mean" }),
			"mean of the passes",
			gaps ? "; gap: their difference in standard errors of the mean" : "",
		),
		head(...heads),
		el("tbody", {}, ...rows),
	);
}
