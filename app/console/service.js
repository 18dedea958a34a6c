// What the page asks of the service, and how it is told of errors.

/** @typedef {{name: string, p: number, scaling: string, mask_shape: number[], folded: boolean}} Site */
/** @typedef {{input: any[], truth: string | number[] | null}} Example A row, nested to the shape. */
/**
 * @typedef {object} Model What the service tells of a model: its manifest and more.
 * @property {string} name
 * @property {number} version
 * @property {"classification" | "regression"} task
 * @property {{shape: number[], features: string[], feature_ranges: number[][], range: number[]}} input
 * @property {{labels: string[], units: string[] | null}} outputs
 * @property {Site[]} sites
 * @property {"constant" | "input"} noise
 * @property {{expectation_gap: number, expectation_gap_passes: number}} verification
 * @property {Example[]} examples
 * @property {boolean} debug Whether passes are shown.
 */
/** @typedef {{keys: boolean, device: string, models: Object<string, number[]>}} About */
/** @typedef {Object<string, any>} Answer An answer of the HTTP interface. */

/** An error that a person is told of, in the words of the service. */
export class ServiceError extends Error {
	/**
	 * @param {string} message
	 * @param {number} status HTTP's; 0 where there was no answer
	 */
	constructor(message, status = 0) {
		super(message);
		this.status = status;
	}
}

// In memory only: never in storage, an address or the curl command.
let key = "";

/** @param {string} given */
export function useKey(given) {
	if (/[^!-~]/.test(given)) throw new ServiceError("A key has no such characters.");
	key = given;
}

/** @returns {Promise<About>} */
export function about() {
	return call("console/service");
}

/**
 * @param {string} name
 * @param {number} version
 * @param {AbortSignal} signal
 * @returns {Promise<Model>}
 */
export function describe(name, version, signal) {
	return call(`console/models/${encodeURIComponent(name)}/versions/${version}`, { signal });
}

/**
 * Send a request; its answer.
 * @param {string} path without the leading slash, so that it is found behind a prefix, too
 * @param {object} body
 * @param {AbortSignal} [signal]
 * @returns {Promise<Answer>}
 */
export function ask(path, body, signal) {
	const headers = { "content-type": "application/json" };
	return call(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

/**
 * @param {string} path
 * @param {RequestInit} init
 */
async function call(path, init = {}) {
	const headers = new Headers(init.headers);
	if (key) headers.set("x-api-key", key);
	let response;
	let text;
	try {
		response = await fetch(path, { ...init, headers, cache: "no-store" });
		text = await response.text();
	} catch (error) {
		if (init.signal?.aborted) throw error;
		throw new ServiceError("The service does not answer.");
	}
	const { ok, status } = response;
	let document;
	try {
		document = JSON.parse(text);
	} catch {
		throw new ServiceError(`Something else than the service has answered (${status}).`, status);
	}
	if (ok) return document;
	// What is served may be other than when the page was loaded.
	const more = status === 404 ? ". Load the page again to see what is served now." : "";
	throw new ServiceError(`${document.detail} (${status})${more}`, status);
}

/**
 * Write a request as a command line.
 * @param {string} path
 * @param {object} body
 */
export function curl(path, body) {
	const url = new URL(path, document.baseURI).href;
	const header = key ? ' -H "X-API-Key: $KEY"' : "";
	// Names may hold what a shell reads otherwise.
	const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
	return `curl -H 'Content-Type: application/json'${header} -d '${quoted}' ${url}`;
}
