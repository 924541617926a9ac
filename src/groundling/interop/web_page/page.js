// The page of a model that runs in the visitor's browser: loads the weights, and writes.
// No request leaves for any other origin than the page's own.
"use strict";

const element = (id) => document.getElementById(id);
const { model, bytes, window: windowLength } = document.body.dataset;
const N_WINDOW = Number(windowLength); // tokens that the model was trained to read at once
const MEGABYTE = 1e6;
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

async function fetchWeights() {
  const total = Number(bytes);
  const progress = element("progress");
  element("loading").hidden = false;
  let response;
  try {
    response = await fetch(model);
  } catch {
    throw new Trouble("The weights cannot be loaded: the connection failed. Reload the page to try again.");
  }
  if (!response.ok) throw new Trouble(`The weights cannot be loaded: the server answers ${response.status} for ${model}.`);
  const parts = [];
  let loaded = 0;
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      parts.push(value);
      loaded += value.length;
      progress.value = loaded;
      say(`Loading the weights: ${(loaded / MEGABYTE).toFixed(1)} of ${(total / MEGABYTE).toFixed(1)} MB`);
    }
  } catch {
    throw new Trouble(`The weights cannot be loaded: the connection broke after ${(loaded / MEGABYTE).toFixed(1)} MB. Reload the page to try again.`);
  }
  if (loaded !== total)
    throw new Trouble(`The weights cannot be used: ${loaded} bytes came where ${total} belong to this page. The folder was not copied whole.`);
  return new Blob(parts);
}

async function start() {
  checkBrowser();
  say("Loading the program …");
  let library;
  try {
    library = await import("./wllama.js");
  } catch {
    throw new Trouble("The program that computes the model (wllama.js) cannot be loaded: reload the page to try again.");
  }
  const logger = { debug() {}, log() {}, warn: console.warn, error: console.error };
  const program = new library.Wllama({ default: "./wllama.wasm" }, { suppressNativeLog: true, logger });
  // Taken by browsers without JSPI or Memory64 (Safari); the library's own default is a copy on another origin.
  program.setCompat({ worker: "./wllama-compat.js", wasm: "./wllama-compat.wasm" });
  const weights = await fetchWeights();
  say("Reading the weights …");
  const settings = { n_ctx: N_WINDOW, n_parallel: 1, n_gpu_layers: 0, cache_type_k: "f32", cache_type_v: "f32", flash_attn: false };
  if (self.crossOriginIsolated) settings.n_threads = Math.max(1, Math.floor((navigator.hardwareConcurrency || 1) / 2));
  else settings.n_threads = 1;
  try {
    await program.loadModel([weights], { ...settings, warmup: false });
  } catch (error) {
    console.error(error);
    throw new Trouble("The model cannot be started: this browser's WebAssembly lacks what it needs, or its memory is too small. Try a newer browser.");
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
        const n = timings ? timings.predicted_n : nWritten + 1;
        if (choice && (choice.text || n > nWritten)) onPiece(choice.text || "", n - nWritten);
        nWritten = Math.max(n, nWritten);
        if (choice && choice.finish_reason) reason = choice.finish_reason;
        else if (timings && (timings.cache_n || 0) + timings.prompt_n + nWritten >= N_WINDOW) full.abort();
      },
    });
  } catch (error) {
    if (error.name !== "AbortError") {
      if (!/context|exceed/i.test(error.message)) throw error;
      reason = "window"; // the prompt alone is longer
    }
  } finally {
    stopping.signal.removeEventListener("abort", halt);
  }
  return { nWritten, reason };
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
  while (nWritten < nTokens && !stopping.signal.aborted) {
    const before = context.length;
    const { reason, nWritten: n } = await continueText(context, settings, nTokens - nWritten, onPiece);
    if (reason === "stop") break;
    if (stopping.signal.aborted || nWritten >= nTokens) break;
    if (n === 0 && before < 2) throw new Trouble("The model could not read this beginning: try another.");
    context = context.slice(-Math.ceil(context.length / 2)); // as the last half of a full window is read anew
  }
  const end = nWritten < nTokens && !stopping.signal.aborted ? "the text ended" : "done";
  say(`${stopping.signal.aborted ? "Stopped" : end[0].toUpperCase() + end.slice(1)} after ${nWritten} token${nWritten === 1 ? "" : "s"}.`);
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
