// Chat with a GGUF model in the page. wllama (llama.cpp as WebAssembly) computes in a worker, and
// nothing leaves the page. `page.json` has the names of the files and the model's context length.

const TEXTS = {
  zh: {
    newChat: "新对话", settings: "设置", language: "English",
    system: "系统提示词", temperature: "温度（0 为贪心解码）", topP: "top-p",
    maxTokens: "最多生成的词元数", seed: "随机种子（留空则随机）",
    welcome: "和这个小模型聊聊", private: "模型就在这个页面里运行，你输入的内容不会离开这台设备。",
    examples: ["你是谁？", "长江有多长？", "海水为什么是咸的？"],
    send: "发送", stop: "停止", placeholder: "输入消息",
    notice: "小模型经常答错，请勿当真。", licence: "许可证",
    loading: (percent) => `正在加载模型：${percent}%`, starting: () => "正在启动……",
    ready: (type, mb) => `${type} · ${mb} MB · 在本机运行`,
    rate: (tokens, rate) => `${tokens} 个词元 · 每秒 ${rate} 个`,
    cut: "已达到长度上限", stopped: "已停止", empty: "模型没有给出回答。", dropped: (n) => `上下文已满，略去了最早的 ${n} 条消息`,
    tooLong: "这条消息超过了模型的上下文长度，请缩短后重发。", failed: (reason) => `出错了：${reason}`,
  },
  en: {
    newChat: "New chat", settings: "Settings", language: "中文",
    system: "System prompt", temperature: "Temperature (0: greedy)", topP: "Top-p",
    maxTokens: "Maximum new tokens", seed: "Seed (empty: random)",
    welcome: "Chat with a small model",
    private: "The model runs inside this page. What you type never leaves your device.",
    examples: ["Who are you?", "How long is the Yangtze?", "Why is the sea salty?"],
    send: "Send", stop: "Stop", placeholder: "Type a message",
    notice: "Small models are often wrong.", licence: "Licences",
    loading: (percent) => `Loading the model: ${percent}%`, starting: () => "Starting…",
    ready: (type, mb) => `${type} · ${mb} MB · on this device`,
    rate: (tokens, rate) => `${tokens} tokens · ${rate} tokens/s`,
    cut: "length limit reached", stopped: "stopped", empty: "The model gave no answer.",
    dropped: (n) => `context full: left out the ${n} oldest messages`,
    tooLong: "This message is longer than the model's context. Shorten it and send it again.",
    failed: (reason) => `Error: ${reason}`,
  },
};

const $ = (id) => document.getElementById(id);
let language = navigator.language.startsWith("zh") ? "zh" : "en";
let status = ["starting"];  // key and values of the line below the name
let messages = [];  // {role, content} of the conversation so far
let abort = null;  // AbortController of the answer that is being generated
let engine = null;  // Wllama, once it is loaded
let ready = [];  // the status then

function text(key, ...values) {
  const entry = TEXTS[language][key];
  return typeof entry === "function" ? entry(...values) : entry;
}

function showStatus(key, ...values) {
  status = [key, ...values];
  $("status").textContent = text(...status);
  $("status").classList.toggle("error", ["failed", "tooLong"].includes(key));
}

function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text]"))
    element.textContent = text(element.dataset.text);
  $("language").textContent = text("language");
  $("input").placeholder = text("placeholder");
  $("input").ariaLabel = text("placeholder");
  $("examples").replaceChildren(...text("examples").map((question) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = question;
    button.addEventListener("click", () => send(question));
    return button;
  }));
  showStatus(...status);
}

// Value of a number field within its limits; undefined if it is empty.
function number(id) {
  const { valueAsNumber: value, min, max } = $(id);
  if (Number.isNaN(value)) return undefined;
  return Math.min(Math.max(value, Number(min)), max === "" ? Infinity : Number(max));
}

function add(kind, content) {
  const element = document.createElement("div");
  element.className = kind;
  element.textContent = content;
  $("messages").append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

function setBusy(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
}

// Register the service worker and wait until files pass through it, which stores them.
async function enableOffline() {
  if (!navigator.serviceWorker) return;
  const controlled = new Promise((resolve) => {
    if (navigator.serviceWorker.controller) resolve();
    navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true });
  });
  const timeout = new Promise((resolve) => setTimeout(resolve, 3000));
  await navigator.serviceWorker.register("sw.js");
  await Promise.race([controlled, timeout]);
}

// The stored copies of an earlier export are of no use once this one is loaded.
async function forgetOldFiles(page) {
  if (!window.caches) return;  // reading it may already be an error where storage is blocked
  const scope = new URL("./", location.href).href;
  const cache = await caches.open(`minimind ${scope}`);
  for (const { url } of await cache.keys()) {
    const name = url.slice(scope.length).split("/")[0];
    const isVersioned = name.startsWith("model-") || name.startsWith("wllama-");
    if (isVersioned && name !== page.model && name !== page.engine) await cache.delete(url);
  }
}

// Download the model as a Blob, with progress.
async function download(url, size) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: HTTP ${response.status}`);
  let loaded = 0;
  const counted = response.body.pipeThrough(new TransformStream({
    transform(chunk, controller) {
      loaded += chunk.length;
      const percent = Math.min(100, Math.round((100 * loaded) / size));
      $("progress").value = percent;
      showStatus("loading", percent);
      controller.enqueue(chunk);
    },
  }));
  return new Response(counted).blob();
}

async function start() {
  await enableOffline().catch(console.warn);  // where storage is blocked
  const page = await (await fetch("page.json", { cache: "no-cache" })).json();
  $("name").textContent = document.title = page.name;
  $("max-tokens").max = page.context;
  $("max-tokens").value = Math.min(256, page.context >> 1);
  $("licence").href = `${page.engine}/LICENCE.txt`;
  const { Wllama } = await import(`./${page.engine}/index.min.js`);
  const wllama = new Wllama({ default: `${page.engine}/wllama.wasm` }, { suppressNativeLog: true });
  // For Safari; by default wllama would load these files from another host.
  wllama.setCompat({ worker: `${page.engine}/compat.js`, wasm: `${page.engine}/compat.wasm` });
  const model = await download(page.model, page.size);
  showStatus("starting");
  await wllama.loadModel([model], {
    // One thread, because more need HTTP headers that most static hosts do not send.
    n_ctx: page.context, n_threads: 1, n_gpu_layers: 0, n_parallel: 1,
    cache_type_k: page.cache_type, cache_type_v: page.cache_type,
    jinja: true, reasoning_format: "none",
  });
  engine = wllama;
  $("progress").value = 100;
  $("progress").className = "done";
  ready = ["ready", page.type, (page.size / 1e6).toFixed(1)];
  showStatus(...ready);
  $("send").disabled = $("input").disabled = false;
  $("input").focus();
  await forgetOldFiles(page).catch(console.warn);
}

// Chunks of the answer. While the prompt exceeds the context, the oldest exchange is left out.
async function* stream(conversation, signal) {
  const system = $("system").value.trim();
  for (let dropped = 0; dropped < conversation.length; dropped += 2) {
    const kept = conversation.slice(dropped);
    try {
      const chunks = await engine.createChatCompletion({
        messages: system ? [{ role: "system", content: system }, ...kept] : kept,
        stream: true, timings_per_token: true, abortSignal: signal,
        max_tokens: number("max-tokens"), seed: number("seed"),
        temperature: number("temperature"), top_p: number("top-p"),
        top_k: 0, min_p: 0, repeat_penalty: 1,
      });
      for await (const chunk of chunks) yield { chunk, dropped };
      return;
    } catch (error) {
      if (!/context/i.test(error.message)) throw error;
    }
  }
  throw new RangeError("longer than the context");
}

async function answer() {
  const conversation = messages;  // `messages` is another array after "new chat"
  const element = add("message assistant busy", "");
  let content = "", reason = "", timings = null, dropped = 0;
  abort = new AbortController();
  setBusy(true);
  showStatus(...ready);  // instead of the error of an earlier message
  try {
    for await (const part of stream(conversation, abort.signal)) {
      const [choice] = part.chunk.choices;
      content += choice?.delta?.content ?? "";
      reason = choice?.finish_reason ?? reason;
      timings = part.chunk.timings ?? timings;
      dropped = part.dropped;
      element.textContent = content;
      element.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    reason = error.name === "AbortError" ? "stopped" : "failed";
    if (error instanceof RangeError) showStatus("tooLong");
    else if (reason === "failed") showStatus("failed", error.message ?? String(error));
  }
  setBusy(false);
  if (conversation !== messages) return;
  element.classList.remove("busy");
  if (!content.trim()) {  // the question goes back into the field, unless it has another one
    const question = conversation.pop().content;
    $("input").value ||= question;
    element.previousElementSibling.remove();
    element.remove();
    if (reason !== "failed") showStatus(reason === "stopped" ? "stopped" : "empty");
    return;
  }
  conversation.push({ role: "assistant", content });
  const notes = [];
  if (timings?.predicted_n)
    notes.push(text("rate", timings.predicted_n, timings.predicted_per_second.toFixed(1)));
  if (reason === "length") notes.push(text("cut"));
  if (reason === "stopped") notes.push(text("stopped"));
  if (dropped) notes.push(text("dropped", dropped));
  if (notes.length) add("note", notes.join(" · "));
}

function send(content) {
  if (!content.trim() || !engine || $("send").hidden) return;
  $("welcome").hidden = true;
  messages.push({ role: "user", content });
  add("message user", content);
  answer();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = $("input").value.trim();
  if ($("send").hidden) return;
  $("input").value = "";
  send(content);
});
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => abort?.abort());
$("new-chat").addEventListener("click", () => {
  abort?.abort();
  messages = [];
  for (const element of document.querySelectorAll("#messages > :not(#welcome)")) element.remove();
  $("welcome").hidden = false;
  $("input").focus();
});
$("open-settings").addEventListener("click", () => {
  $("settings").hidden = !$("settings").hidden;
  $("open-settings").ariaExpanded = String(!$("settings").hidden);
});
$("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  translate();
});

translate();
start().catch((error) => showStatus("failed", error.message ?? String(error)));
