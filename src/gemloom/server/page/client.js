/** Talks to the server: the model's name and streamed answers. Nothing here touches the page. */

/** What went wrong, as a line to read; `status` is the HTTP status, 0 where there was none. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.name = "ApiError";
    this.status = status;
  }
}

/**
 * The name of the model that the server serves.
 * @param {{key: string, signal?: AbortSignal}} options
 * @returns {Promise<string>}
 * @throws {ApiError}
 */
export async function modelName({ key, signal }) {
  const response = await send("v1/models", { key, signal });
  const answer = parse(await response.text());
  if (!answer.data?.[0]?.id) throw new ApiError("The server names no model.");
  return answer.data[0].id;
}

/**
 * The chunks of one answer as they arrive, from POST /v1/chat/completions.
 * @param {object} body the request, with `stream: true`
 * @param {{key: string, signal: AbortSignal}} options
 * @returns {AsyncGenerator<object>}
 * @throws {ApiError} for an error answer, an error event, or a stream that ends before `[DONE]`
 * @throws {DOMException} AbortError, where `signal` aborted
 */
export async function* streamChat(body, { key, signal }) {
  const response = await send("v1/chat/completions", { key, signal, body });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = parse(data);
    if (chunk.error)
      throw new ApiError(chunk.error.message ?? "The server failed", chunk.error.status);
    yield chunk;
  }
  throw lost();
}

async function send(path, { key, signal, body }) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (key) headers.Authorization = `Bearer ${key}`;
  const method = body ? "POST" : "GET";
  try {
    const response = await fetch(path, {
      method,
      headers,
      signal,
      body: body && JSON.stringify(body),
    });
    if (response.ok) return response;
    throw await refusal(response);
  } catch (error) {
    if (error instanceof TypeError) throw new ApiError("The server cannot be reached.");
    throw error;
  }
}

async function refusal(response) {
  const answer = await response.json().catch(() => ({})); // a proxy's page, perhaps
  const message =
    answer.error?.message ?? `The server answered ${response.status} ${response.statusText}`;
  return new ApiError(message, response.status);
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError(`The server sent what is not JSON: ${data.slice(0, 80)}`);
  }
}

function lost() {
  return new ApiError("The connection was lost before the answer ended.");
}

/** The data of each server-sent event. Comments and other fields are passed over. */
async function* events(stream, signal) {
  let data = [];
  for await (const line of lines(stream, signal)) {
    if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
    if (line || !data.length) continue;
    yield data.join("\n");
    data = [];
  }
}

async function* lines(stream, signal) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await read(reader, signal);
      if (done) return;
      // A CR at the end may be half of a CRLF.
      const whole = (rest + decoder.decode(value, { stream: true })).split(/\r\n|\n|\r(?!$)/);
      rest = whole.pop();
      yield* whole;
    }
  } finally {
    reader.cancel().catch(() => {}); // it has failed already, where this fails
  }
}

async function read(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal.aborted) throw error;
    throw lost();
  }
}
