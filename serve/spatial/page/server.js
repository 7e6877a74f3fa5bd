// Talking to the server.

const API = new URL("v1/", document.baseURI);

export class Refusal extends Error {
  constructor(status, error) {
    super(error?.message || `the server answered ${status}`);
    this.status = status;
    this.errors = error?.errors || [];
  }
}

function headers() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function refusal(status, text) {
  try {
    return new Refusal(status, JSON.parse(text).error);
  } catch {
    return new Refusal(status, null);
  }
}

export async function ask(path, options = {}) {
  const answer = await fetch(new URL(path, API), { ...options, headers: headers() });
  if (!answer.ok) throw refusal(answer.status, await answer.text());
  return answer;
}

// fetch() cannot say how much of an upload is sent. `stop` is called with a function that ends it.
export function upload(form, onProgress, stop) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", new URL("jobs", API));
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    request.onload = () =>
      request.status < 300
        ? resolve(JSON.parse(request.responseText))
        : reject(refusal(request.status, request.responseText));
    request.onerror = () => reject(new Error("The connection was lost while sending. Try again."));
    request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
    request.send(form);
    stop(() => request.abort());
  });
}
