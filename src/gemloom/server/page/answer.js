/** One answer: what is asked, and how the chunks that arrive add up. Pure: no page, no network. */

const MEASURABLE = 100; // milliseconds; what comes in less came in one packet

/**
 * @typedef {object} Message
 * @property {"user" | "assistant"} role
 * @property {string} content
 * @property {string} [reasoning] what the model thought before it answered
 * @property {{name: string, arguments: string}[]} [calls] tools the model wants called
 * @property {object} [usage] tokens and seconds, for the line below the answer
 * @property {number} [thought] seconds of thinking
 * @property {string} [finish] why it ended: stop, length, tool_calls, or stopped by the reader
 * @property {string} [error] why it failed
 */

/**
 * The request for the next answer in a conversation.
 * @param {Message[]} messages
 * @param {import("./settings.js").Settings} settings
 * @param {string} model
 */
export function requestBody(messages, settings, model) {
  const { system, thinking, ...sampling } = settings;
  const sent = messages.map(({ role, content }) => ({ role, content }));
  if (system.trim()) sent.unshift({ role: "system", content: system });
  return {
    ...sampling,
    model,
    messages: sent,
    stream: true,
    stream_options: { include_usage: true },
    chat_template_kwargs: { enable_thinking: thinking },
  };
}

/**
 * A request under way, and the message it fills. Times are in milliseconds of `performance.now()`.
 * @param {number} now
 */
export function newRun(now) {
  const message = { role: "assistant", content: "", reasoning: "", calls: [] };
  return {
    message,
    control: new AbortController(),
    started: now,
    first: null,
    last: null,
    thinking: null,
  };
}

/**
 * Adds one chunk of the stream to the run's message.
 * @param {ReturnType<newRun>} run
 * @param {object} chunk as OpenAI's `chat.completion.chunk`
 * @param {number} now
 */
export function fold(run, chunk, now) {
  const { message } = run;
  const choice = chunk.choices?.[0];
  const { content, reasoning_content: thought, tool_calls: calls } = choice?.delta ?? {};
  if (content || thought || calls) {
    run.first ??= now;
    run.last = now;
  }
  if (thought) {
    run.thinking ??= now;
    message.reasoning += thought;
  } else if (content || calls) endThought(run, now);
  message.content += content ?? "";
  foldCalls(message.calls, calls ?? []);
  if (choice?.finish_reason) message.finish = choice.finish_reason;
  if (chunk.usage) message.usage = usageOf(chunk.usage);
}

/**
 * Ends a run, whatever ended it, and fills in the times.
 * @param {ReturnType<newRun>} run
 * @param {number} now
 */
export function finish(run, now) {
  const { message, started, first, last } = run;
  endThought(run, now);
  if (!message.usage || first === null) return;
  message.usage.wait = (first - started) / 1000;
  const more = message.usage.completion - 1; // the first token's time is the prompt's
  if (more > 0 && last - first > MEASURABLE) message.usage.speed = (more / (last - first)) * 1000;
}

function endThought(run, now) {
  if (run.thinking === null) return;
  run.message.thought = (run.message.thought ?? 0) + (now - run.thinking) / 1000;
  run.thinking = null;
}

function foldCalls(calls, deltas) {
  for (const { index = 0, function: part = {} } of deltas) {
    calls[index] ??= { name: "", arguments: "" };
    calls[index].name += part.name ?? "";
    calls[index].arguments += part.arguments ?? "";
  }
}

function usageOf(usage) {
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  return { prompt: usage.prompt_tokens, completion: usage.completion_tokens, cached };
}

/**
 * The line below an answer.
 * @param {Message} message
 * @returns {string}
 */
export function summary({ usage, finish: why }) {
  const said = [];
  if (why === "stopped") said.push("stopped");
  if (why === "length") said.push("cut at the limit of tokens");
  if (!usage) return said.join(" · ");
  const count = (n, name) => `${n.toLocaleString("en")} ${name}${n === 1 ? "" : "s"}`;
  if (usage.speed) said.push(`${usage.speed.toFixed(1)} tokens/s`);
  said.push(count(usage.completion, "token"));
  said.push(`prompt ${count(usage.prompt, "token")}, ${usage.cached.toLocaleString("en")} cached`);
  if (usage.wait !== undefined) said.push(`first after ${usage.wait.toFixed(1)} s`);
  return said.join(" · ");
}
