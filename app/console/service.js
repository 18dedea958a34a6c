// Requests to the service, and its errors.

/** @typedef {{name: string, p: number, scaling: string, mask_shape: number[], folded: boolean}} Site */
/** @typedef {{input: any[], truth: string | number[] | null}} Example A row, nested to the shape. */
/**
 * @typedef {object} Model A model's manifest and more.
 * @property {string} name
 * @property {number} version
 * @property {"classification" | "regression"} task
 * @property {{shape: number[], features: string[], feature_ranges: number[][], range: number[]}} input
 * @property {{labels: string[], units: string[] | null}} outputs
 * @property {Site[]} sites
 * @property {"constant" | "input"} noise
 * @property {{expectation_gap: number, expectation_gap_passes: number}} verification
 * @property {Example[]} examples
 * @property {boolean} debug Whether the passes may be shown.
 */
/**
 * @typedef {object} About
 * @property {boolean} keys Whether requests need a key.
 * @property {string} device
 * @property {Object<string, number[]>} models Versions of each model.
 * @property {Object<string, string | number>} defaults Fields of a request.
 */
/** @typedef {Object<string, any>} Answer A response of the HTTP interface. */

/** An error to be shown as it is, in the service's own words. */
export class ServiceError extends Error {
	/**
	 * @param {string} message
	 * @param {number} status HTTP status; 0 without a response
	 */
	constructor(message, status = 0) {
		super(message);
		this.status = status;
	}
}

// In memory only: never in storage, a URL or the curl command.
let key = "";

/** @param {string} given */
export function useKey(given) {
	if (/[^!-~]/.test(given)) throw new ServiceError("Keys hold visible ASCII characters only.");
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
 * Send a request and return the answer.
 * @param {string} path without a leading slash, so that it works behind a prefix
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
		throw new ServiceError("The service is not responding.");
	}
	const { ok, status } = response;
	let document;
	try {
		document = JSON.parse(text);
	} catch {
		throw new ServiceError(`The response is not from the service (${status}).`, status);
	}
	if (ok) return document;
	// The models may have changed since the page was loaded.
	const more = status === 404 ? ". Reload the page to see what is served now." : "";
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
	// A quote in a name would end the shell's string.
	const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
	return `curl -H 'Content-Type: application/json'${header} -d '${quoted}' ${url}`;
}
