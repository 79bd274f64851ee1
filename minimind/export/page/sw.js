// Service worker: keeps the page usable without a network. Browsers run it on https and localhost.
// Names of the model and of wllama's folder change with their content, so a stored copy of these
// files is used at once. All other files come from the network, or from the store without one.
const CACHE = `minimind ${self.registration.scope}`;
const SHELL = ["./", "app.js", "style.css"];  // loaded before the service worker runs
const IMMUTABLE = /\/(model-[0-9a-f]+\.gguf|wllama-[\d.]+\/[^/]+)$/;

self.addEventListener("install", (event) => {
  self.skipWaiting();
  const requests = SHELL.map((file) => new Request(file, { cache: "no-cache" }));
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(requests)));
});

self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method === "GET" && request.url.startsWith(self.registration.scope))
    event.respondWith(answer(event, request));
});

async function answer(event, request) {
  const cache = await caches.open(CACHE);
  const stored = await cache.match(request, { ignoreSearch: true });
  const isImmutable = IMMUTABLE.test(new URL(request.url).pathname);
  if (stored && isImmutable) return stored;
  try {
    const response = await fetch(request, isImmutable ? {} : { cache: "no-cache" });
    // Without space for the copy the page still works.
    if (response.status === 200)
      event.waitUntil(cache.put(request, response.clone()).catch(console.warn));
    return response;
  } catch (error) {
    const fallback = stored ?? (request.mode === "navigate" ? await cache.match("./") : undefined);
    if (fallback) return fallback;
    throw error;
  }
}
