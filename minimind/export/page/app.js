// Chat with a GGUF model in the page. wllama (llama.cpp as WebAssembly) does the arithmetic in a
// worker; nothing leaves the page. `page.json` names the model file and its context length.
import { Wllama } from "./wllama/index.min.js";

const TEXTS = {
  zh: {
    settings: "设置", system: "系统提示词", temperature: "温度", topP: "top-p", maxTokens: "最多生成的词元数",
    seed: "随机种子（留空为随机）", send: "发送", stop: "停止", clear: "清空对话", placeholder: "说点什么……",
    loading: (percent) => `正在加载模型……${percent}%`, ready: (mb) => `模型已就绪（${mb} MB），完全在本页面内运行`,
    rate: (n, s) => `${n} 个词元，每秒 ${(n / s).toFixed(1)} 个`, cut: "已达到生成长度上限", stopped: "已停止",
    failed: (why) => `出错了：${why}`, truncated: (n) => `为了放进上下文，省去了最早的 ${n} 条消息`,
    tooLong: "这条消息比模型的上下文还长，请缩短后再发", language: "English",
  },
  en: {
    settings: "Settings", system: "System prompt", temperature: "Temperature", topP: "Top-p",
    maxTokens: "Maximum new tokens", seed: "Seed (empty = random)", send: "Send", stop: "Stop",
    clear: "Clear", placeholder: "Say something…", loading: (percent) => `Loading the model… ${percent}%`,
    ready: (mb) => `Model ready (${mb} MB); it runs entirely in this page`,
    rate: (n, s) => `${n} tokens, ${(n / s).toFixed(1)} tokens/s`, cut: "token limit reached",
    stopped: "stopped", failed: (why) => `Error: ${why}`,
    truncated: (n) => `dropped the ${n} oldest messages to fit the context`,
    tooLong: "This message is longer than the model's context; please shorten it", language: "中文",
  },
};
const $ = (id) => document.getElementById(id);
const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
let language = navigator.language.startsWith("zh") ? "zh" : "en";
let status = { key: "loading", values: [0] };
let messages = [];  // {role, content} of the conversation so far
let abort = null;   // AbortController of the answer being generated

const text = (key, ...values) => {
  const found = TEXTS[language][key];
  return typeof found === "function" ? found(...values) : found;
};

function show(key, ...values) {
  status = { key, values };
  $("status").textContent = text(key, ...values);
  $("status").className = key === "failed" || key === "tooLong" ? "error" : "";
}

function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text]"))
    element.textContent = text(element.dataset.text);
  $("input").placeholder = text("placeholder");
  $("language").textContent = text("language");
  show(status.key, ...status.values);
}

function addMessage(role, content) {
  const element = document.createElement("div");
  element.className = `message ${role}`;
  element.textContent = content;
  $("messages").append(element);
  element.scrollIntoView();
  return element;
}

function addNote(content) {
  const element = document.createElement("p");
  element.className = "rate";
  element.textContent = content;
  $("messages").append(element);
  element.scrollIntoView();
}

function setBusy(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("send").disabled = $("input").disabled = false;
}

const page = await (await fetch("page.json")).json();
$("name").textContent = document.title = page.name;
$("max-tokens").max = page.context;
$("max-tokens").value = Math.min(256, page.context >> 1);
translate();
const engine = new Wllama({ default: new URL("wllama/wllama.wasm", location.href).href },
                          { suppressNativeLog: true, allowOffline: true });

async function load() {
  await engine.loadModelFromUrl(new URL(page.file, location.href).href, {
    n_ctx: page.context, n_threads: 1, n_gpu_layers: 0, n_parallel: 1, useCache: false,
    cache_type_k: page.cache_type, cache_type_v: page.cache_type, jinja: true,
    progressCallback: ({ loaded, total }) => show("loading", Math.round((100 * loaded) / total)),
  });
  show("ready", (page.size / 1e6).toFixed(1));
  setBusy(false);
  $("input").focus();
}

// The oldest exchanges go when the conversation no longer fits; wllama reports that as an error.
async function* answers(conversation, system) {
  for (let dropped = 0; ; dropped += 2) {
    const kept = conversation.slice(dropped);
    if (!kept.length) throw new Error(text("tooLong"));
    try {
      const stream = await engine.createChatCompletion({
        messages: system ? [{ role: "system", content: system }, ...kept] : kept,
        stream: true, max_tokens: number("max-tokens"), temperature: number("temperature"),
        top_p: number("top-p"), top_k: 0, min_p: 0, penalty_repeat: 1, seed: number("seed"),
        abortSignal: abort.signal,
      });
      if (dropped) addNote(text("truncated", dropped));
      yield* stream;
      return;
    } catch (error) {
      if (!/context|exceed|too long/i.test(error.message ?? "")) throw error;
    }
  }
}

async function answer() {
  const element = addMessage("assistant", "");
  let content = "", tokens = 0, reason = "", first = 0;
  abort = new AbortController();
  setBusy(true);
  try {
    for await (const chunk of answers(messages, $("system").value.trim())) {
      first ||= performance.now();
      const choice = chunk.choices[0];
      if (choice?.delta?.content) {
        content += choice.delta.content;
        tokens += 1;
        element.textContent = content;
        element.scrollIntoView();
      }
      reason = choice?.finish_reason ?? reason;
    }
  } catch (error) {
    if (error.name === "AbortError" || abort.signal.aborted) reason = "stopped";
    else { show("failed", error.message ?? String(error)); reason = "failed"; }
  }
  const seconds = (performance.now() - first) / 1000;
  if (content || reason !== "failed") messages.push({ role: "assistant", content });
  else { element.remove(); messages.pop(); }
  const notes = tokens ? [text("rate", tokens, Math.max(seconds, 1e-3))] : [];
  if (reason === "length") notes.push(text("cut"));
  if (reason === "stopped") notes.push(text("stopped"));
  if (notes.length) addNote(notes.join(" · "));
  setBusy(false);
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const content = $("input").value.trim();
  if (!content || $("send").hidden) return;
  $("input").value = "";
  messages.push({ role: "user", content });
  addMessage("user", content);
  await answer();
});
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => abort?.abort());
$("clear").addEventListener("click", () => {
  abort?.abort();
  messages = [];
  $("messages").replaceChildren();
});
$("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  translate();
});
load().catch((error) => show("failed", error.message ?? String(error)));
