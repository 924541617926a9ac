// The page of a model that runs in the visitor's browser: loads the weights, and writes.
// No request leaves for any other origin than the page's own.
"use strict";

const element = (id) => document.getElementById(id);
const { model, bytes, window: windowLength } = document.body.dataset;
const N_WINDOW = Number(windowLength); // tokens that the model was trained to read at once
const MEGABYTE = 1e6;
const SMALL_BYTES = 30 * MEGABYTE;
const MAX_THREADS = 8; // a guess: machines with more cores were not measured
const MAX_FAILURES = 20; // tokens in a row that are no text, before the program is taken to be broken
const NEW_TEXT = "<|endoftext|>"; // what an empty prompt begins after

let wllama = null;
let stopping = null; // of the text that is being written

class Trouble extends Error {} // its message is a sentence for the visitor

function say(sentence) {
  element("status").textContent = sentence;
}

function fail(error) {
  console.error(error);
  say("");
  element("loading").hidden = true;
  element("error").hidden = false;
  element("error").textContent =
    error instanceof Trouble ? error.message : `Something went wrong here: ${error.message || error}. Reload the page to try again.`;
}

function checkBrowser() {
  if (location.protocol === "file:")
    throw new Trouble("A page opened as a file may not load its weights: run “python -m http.server” in its folder and open http://localhost:8000.");
  if (typeof WebAssembly !== "object" || typeof Worker !== "function")
    throw new Trouble("This browser has no WebAssembly, which computes the model: allow it in the settings, or take a newer browser.");
}

// A file of this folder as a Blob; `total` is how many bytes it must have, if that is known.
async function fetchWhole(url, what, type, total) {
  const progress = element("progress");
  if (total) progress.max = total;
  else progress.removeAttribute("value");
  element("loading").hidden = false;
  const sorry = `${what} cannot be loaded`;
  let response;
  try {
    response = await fetch(url);
  } catch {
    throw new Trouble(`${sorry}: the connection failed. Reload the page to try again.`);
  }
  if (!response.ok) throw new Trouble(`${sorry}: the server answers ${response.status} for ${url}.`);
  const parts = [];
  let loaded = 0;
  const reader = response.body.getReader();
  const inMegabytes = (n) => (n / MEGABYTE).toFixed(1);
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      parts.push(value);
      loaded += value.length;
      if (total) progress.value = loaded;
      say(`Loading: ${what.toLowerCase()}, ${inMegabytes(loaded)}${total ? ` of ${inMegabytes(total)}` : ""} MB`);
    }
  } catch {
    throw new Trouble(`${sorry}: the connection broke after ${inMegabytes(loaded)} MB. Reload the page to try again.`);
  }
  if (total && loaded !== total)
    throw new Trouble(`${sorry}: ${loaded} bytes came where ${total} belong to this page. Its folder was not copied whole.`);
  return new Blob(parts, { type });
}

function threads() {
  // Threads need shared memory, which a page has only with the headers of cross-origin isolation. A small network
  // gains little from them, and loses much where something else uses the cores.
  if (!self.crossOriginIsolated || Number(bytes) < SMALL_BYTES) return 1;
  return Math.min(MAX_THREADS, Math.max(1, Math.floor((navigator.hardwareConcurrency || 1) / 2)));
}

async function start() {
  checkBrowser();
  const sorry = "The program that computes the model";
  let library;
  try {
    library = await import("./wllama.js");
  } catch {
    throw new Trouble(`${sorry} (wllama.js) cannot be loaded. Reload the page to try again.`);
  }
  const logger = { debug() {}, log() {}, warn: console.warn, error: console.error };
  // Browsers without JSPI or Memory64 (Safari) take the second build; the library's own default for it lies elsewhere.
  const prepare = (wasm, compat) => {
    const made = new library.Wllama({ default: wasm }, { suppressNativeLog: true, logger });
    made.setCompat({ worker: "./wllama-compat.js", wasm: compat });
    return made;
  };
  const { wasmPath } = prepare("./wllama.wasm", "./wllama-compat.wasm").getWorkerResources();
  const wasm = URL.createObjectURL(await fetchWhole(wasmPath, sorry, "application/wasm"));
  const program = prepare(wasm, wasm);
  const weights = await fetchWhole(model, "The weights", "application/octet-stream", Number(bytes));
  say("Reading the weights …");
  const settings = { n_ctx: N_WINDOW, n_parallel: 1, n_gpu_layers: 0, n_threads: threads(), warmup: false };
  // As `groundling sample` computes: llama.cpp would round what attention remembers to fp16.
  const exact = { cache_type_k: "f32", cache_type_v: "f32", flash_attn: false };
  try {
    await program.loadModel([weights], { ...settings, ...exact });
    // The library goes on where llama.cpp has refused a file.
    if (!program.getModelMetadata().hparams.nVocab) throw new Error("llama.cpp refuses the weights");
  } catch (error) {
    console.error(error);
    throw new Trouble("The model cannot be started: this browser's WebAssembly lacks what it needs, its memory is too small, or the weights are damaged.");
  }
  wllama = program;
  element("loading").hidden = true;
  const n = wllama.getNumThreads();
  say(`Ready, on ${n} thread${n === 1 ? "" : "s"}.`);
  element("write").disabled = false;
}

// One request of the model: pieces of text until it ends, is stopped, or the window is full.
async function continueText(context, settings, nLeft, onPiece) {
  const full = new AbortController();
  const halt = () => full.abort();
  stopping.signal.addEventListener("abort", halt);
  let nWritten = 0;
  let reason = "window";
  let failure = null;
  try {
    await wllama.createCompletion({
      ...settings,
      prompt: context || NEW_TEXT,
      max_tokens: nLeft,
      stream: true,
      timings_per_token: true,
      abortSignal: full.signal,
      onData: (chunk) => {
        const choice = chunk.choices && chunk.choices[0];
        const { timings } = chunk;
        const nPrompt = timings ? (timings.cache_n || 0) + timings.prompt_n : 0;
        if (nPrompt > N_WINDOW) return full.abort(); // the position table is longer, but was not trained so far
        const n = timings ? timings.predicted_n : nWritten + 1;
        if (choice && (choice.text || n > nWritten)) onPiece(choice.text || "", n - nWritten);
        nWritten = Math.max(n, nWritten);
        if (choice && choice.finish_reason) reason = choice.finish_reason;
        else if (timings && nPrompt + nWritten >= N_WINDOW) full.abort();
      },
    });
  } catch (error) {
    failure = error;
    // The library fails where a token's bytes are no text (its messages are UTF-8); it can go on after that.
    if (error.name === "RuntimeError") reason = "bytes";
    // Anything else but our own halt, and a prompt that alone is longer than the window, is in earnest.
    else if (error.name !== "AbortError" && !/exceeds the available context/.test(error.message)) throw error;
  } finally {
    stopping.signal.removeEventListener("abort", halt);
  }
  return { nWritten, reason, error: failure };
}

async function write() {
  const number = (id) => element(id).valueAsNumber;
  const prompt = element("prompt").value;
  const nTokens = number("length");
  const settings = {
    temperature: number("temperature"),
    top_k: number("top-k"),
    top_p: number("top-p"),
    seed: number("seed"),
    samplers: ["temperature", "top_k", "top_p"],
    min_p: 0,
    repeat_penalty: 1,
  };
  element("error").hidden = true;
  element("page").hidden = false;
  element("given").textContent = prompt;
  element("written").textContent = "";
  element("speed").textContent = "";
  let [context, nWritten, began] = [prompt, 0, 0];
  const onPiece = (piece, n) => {
    const now = performance.now();
    if (nWritten === 0) began = now;
    element("written").append(piece);
    context += piece;
    nWritten += n;
    if (now > began) element("speed").textContent = `${(((nWritten - 1) * 1000) / (now - began)).toFixed(1)} tokens/s`;
  };
  let nFailures = 0; // in a row
  while (nWritten < nTokens && !stopping.signal.aborted) {
    const before = context.length;
    const { reason, nWritten: n, error } = await continueText(context, settings, nTokens - nWritten, onPiece);
    if (reason === "stop") break;
    if (stopping.signal.aborted || nWritten >= nTokens) break;
    settings.seed = (settings.seed + 1) % 2 ** 32; // or what follows would be drawn with the same numbers again
    if (reason === "bytes") {
      nFailures = n ? 1 : nFailures + 1;
      if (nFailures > MAX_FAILURES) throw error;
      onPiece("\ufffd", 1);
      continue;
    }
    nFailures = 0;
    if (n === 0 && before < 2) throw new Trouble("The model could not read this beginning: try another.");
    context = context.slice(-Math.ceil(context.length / 2)); // as the last half of a full window is read anew
  }
  const end = stopping.signal.aborted ? "Stopped" : nWritten < nTokens ? "The text ended" : "Done";
  say(`${end} after ${nWritten} token${nWritten === 1 ? "" : "s"}.`);
}

element("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!wllama || stopping) return;
  stopping = new AbortController();
  element("write").disabled = true;
  element("stop").disabled = false;
  say("Writing …");
  try {
    await write();
  } catch (error) {
    fail(error);
  } finally {
    stopping = null;
    const hadFocus = document.activeElement === element("stop");
    element("stop").disabled = true;
    element("write").disabled = false;
    if (hadFocus) element("write").focus();
  }
});

element("stop").addEventListener("click", () => stopping && stopping.abort());
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element("form").requestSubmit();
});

start().catch(fail);
