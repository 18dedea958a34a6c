-- The request that wrk sends, and the line in which it reports. BODY names the file of the body;
-- JSON_LENGTH, where set, is the length of the JSON before a binary tensor.
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
if (os.getenv("JSON_LENGTH") or "") ~= "" then
  wrk.headers["Inference-Header-Content-Length"] = os.getenv("JSON_LENGTH")
end
local file = assert(io.open(os.getenv("BODY"), "rb"))
wrk.body = file:read("*a")
file:close()

function done(summary, latency, requests)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format(
    'RESULT {"requests": %d, "microseconds": %d, "failed": %d, "p50": %d, "p99": %d}\n',
    summary.requests, summary.duration, failed, latency:percentile(50), latency:percentile(99)))
end
