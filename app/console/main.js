// The page: when it sends which request, and where it shows the answer.

import * as classes from "./classes.js";
import { byId, counted, el, typed } from "./dom.js";
import { Drawing } from "./drawing.js";
import * as dropout from "./dropout.js";
import { about, ask, curl, describe, ServiceError, useKey } from "./service.js";
import { TableInput } from "./table.js";
import * as values from "./values.js";

/** @import { About, Model } from "./service.js" */

const PAUSE_MS = 120; // between a change and its request: a slider moves on
const SEEDS = 2 ** 31;
const DEFAULTED = ["passes", "interval", "masks"];

const picker = /** @type {HTMLSelectElement} */ (byId("model"));
const controls = /** @type {HTMLFormElement} */ (byId("controls"));
const line = /** @type {HTMLTextAreaElement} */ (byId("curl"));
const shown = byId("console");

/** @type {About} */
let service;
/** @type {Model} */
let model;
/** @type {{row(): (number | string)[]}} The form that holds the row. */
let input;
/** @type {AbortController | undefined} Aborts the request under way. */
let asking;
/** @type {ReturnType<typeof setTimeout> | undefined} */
let soon;
/** @type {(() => void) | undefined} Stops the drawing under way. */
let stop;
/** @type {(() => void) | undefined} Shows the last answer again. */
let again;

/** Set the service's defaults, list its models, and show the first. */
async function start() {
	service = await about();
	for (const name of DEFAULTED) control(name).value = String(service.defaults[name]);
	const choices = Object.entries(service.models).flatMap(([name, versions]) =>
		[...versions].reverse().map((version) => ({ name, version })),
	);
	picker.replaceChildren(
		...choices.map(({ name, version }) =>
			el("option", { value: `${name} ${version}` }, `${name}, version ${version}`),
		),
	);
	if (!choices.length) throw new ServiceError("No model is served.");
	byId("key-form").hidden = !service.keys;
	if (service.keys) byId("key").focus();
	else await choose();
}

/** Show the selected model. */
async function choose() {
	const signal = begin();
	const [name, version] = picker.value.split(" ");
	// Even if a request fails, no model is shown under another's name.
	shown.hidden = true;
	byId("answers").hidden = true;
	stop?.();
	again = undefined;
	model = await describe(name, Number(version), signal);
	shown.hidden = false;
	const picture = model.input.features.length === 0 && [2, 3].includes(model.input.shape.length);
	input = picture ? new Drawing(model, later) : new TableInput(model, later);
	byId("no-passes").hidden = model.debug;
	await show();
}

/** Send a request, unless another change follows at once. */
function later() {
	busy(true);
	clearTimeout(soon);
	soon = setTimeout(guarded(show), PAUSE_MS);
}

/** Abort the request under way: its answer or error does not belong to the input any more. */
function begin() {
	busy(true);
	clearTimeout(soon);
	asking?.abort();
	asking = new AbortController();
	return asking.signal;
}

/** Send the input, and show the answer. */
async function show() {
	const signal = begin();
	const who = { model: model.name, version: model.version };
	const inputs = [input.row()];
	const [passes, seed, interval] = ["passes", "seed", "interval"].map((name) => {
		const x = typed(control(name).value);
		// A larger integer would be rounded silently.
		return name === "seed" && !Number.isSafeInteger(x) ? control(name).value : x;
	});
	const body = { ...who, inputs, passes, interval, masks: control("masks").value };
	const seeded = seed === "" ? body : { ...body, seed };
	const path = model.debug ? "debug/mc" : "uncertainty";
	line.value = curl(path, seeded);
	byId("copied").textContent = "";
	const sent = performance.now();
	const answer = await ask(path, seeded, signal);
	const took = performance.now() - sent;
	line.value = curl(path, { ...body, seed: answer.seed });
	let masks = null;
	let deterministic;
	if (model.debug) {
		const drawn = { passes: answer.passes, seed: answer.seed, masks: body.masks };
		masks = await ask("console/masks", { ...who, ...drawn }, signal);
		[deterministic] = answer.deterministic;
	} else {
		const point = await ask("predict", { ...who, inputs }, signal);
		[deterministic] = point.probabilities ?? point.values;
	}
	fail();
	const kind = model.task === "classification" ? classes : values;
	byId("headline").textContent = kind.headline(answer, model);
	byId("answered-by").textContent =
		`${answer.model}, version ${answer.version}, on ${service.device}: ${counted(answer.passes)}, ` +
		`seed ${answer.seed}, answered in ${took.toFixed(1)} ms.`;
	const draw = (/** @type {boolean} */ atOnce) => {
		stop?.();
		stop = kind.show(answer, model, atOnce);
		dropout.show(model, answer, deterministic, masks);
	};
	again = () => draw(true);
	draw(false);
	busy(false);
}

/** @param {boolean} on whether the input's answer is still to come */
function busy(on) {
	shown.setAttribute("aria-busy", String(on));
}

/** @param {string} name */
function control(name) {
	return /** @type {HTMLInputElement} */ (controls.elements.namedItem(name));
}

/**
 * Show an error; without a text, none.
 * @param {string} [text]
 */
function fail(text = "") {
	const place = byId("error");
	place.hidden = !text;
	place.textContent = text;
	// The answer below would not belong to the input.
	byId("answers").hidden = Boolean(text);
}

/**
 * Wrap an action so that its errors are shown.
 * @param {() => Promise<void>} act
 */
function guarded(act) {
	return () =>
		act().catch((error) => {
			// A newer request aborted it.
			if (error.name === "AbortError") return;
			busy(false);
			const expected = error instanceof ServiceError;
			fail(expected ? error.message : "The page has failed; the browser's console says why.");
			if (!expected) throw error;
			if (error.status === 401) {
				byId("key-form").hidden = false;
				byId("key").focus();
			}
		});
}

picker.addEventListener("change", guarded(choose));
controls.addEventListener("submit", (event) => {
	event.preventDefault();
	guarded(show)();
});
controls.addEventListener("change", later);
byId("new-seed").addEventListener("click", () => {
	control("seed").value = String(Math.floor(SEEDS * Math.random()));
	guarded(show)();
});
byId("key-form").addEventListener("submit", (event) => {
	event.preventDefault();
	guarded(async () => {
		const box = /** @type {HTMLInputElement} */ (byId("key"));
		useKey(box.value);
		box.value = "";
		await choose();
	})();
});
byId("copy").addEventListener("click", async () => {
	try {
		await navigator.clipboard.writeText(line.value);
		byId("copied").textContent = "Copied.";
	} catch {
		// Browsers grant the clipboard only to pages served over HTTPS or from localhost.
		line.select();
		byId("copied").textContent = "Selected; copy it with your keyboard.";
	}
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => again?.());
let width = innerWidth;
addEventListener("resize", () => {
	// A phone's address bar changes only the height as it comes and goes.
	if (innerWidth !== width) again?.();
	width = innerWidth;
});
guarded(start)();
