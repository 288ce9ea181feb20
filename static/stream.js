/* Sends a form to the JSON API and reads the answer as it is made. Knows forms and HTTP, nothing of the page. */
"use strict";

const AvitoStream = (() => {
  // Without these the forms are left to the browser, which posts them and gets a page back.
  const canStream = "TextDecoderStream" in window && "body" in Response.prototype;

  /* Resolves once the service has admitted or refused the request; rejects if it is out of reach or `signal` aborts. */
  function post(form, signal) {
    const fields = filledFields(form);
    const headers = {};
    const key = form.elements.api_key?.value.trim();
    // Headers carry ASCII. What is no key anyway is left to the service to refuse.
    if (key) headers.Authorization = `Bearer ${key.replace(/[^\x21-\x7e]/g, "?")}`;
    const isJson = !form.elements.image;
    if (isJson) headers["Content-Type"] = "application/json";
    const body = isJson ? jsonBody(form, fields) : multipartBody(fields);
    return fetch(form.dataset.api, { method: "POST", body, headers, signal, cache: "no-store" });
  }

  /* The prompt goes along even if it is empty, so that the service says what is wrong with it. */
  function filledFields(form) {
    return [...new FormData(form)].filter(([name, value]) => name !== "api_key" && (value !== "" || name === "prompt"));
  }

  function jsonBody(form, fields) {
    const body = Object.fromEntries(fields.map(([name, value]) => [name, jsonValue(form.elements[name], value)]));
    return JSON.stringify({ ...body, stream: true });
  }

  /* A number where one is asked for and given; anything else stays text, and the service says that it is no number. */
  function jsonValue(field, value) {
    const isNumber = ["numeric", "decimal"].includes(field.inputMode) && Number.isFinite(Number(value));
    return isNumber ? Number(value) : value.replaceAll("\r\n", "\n");
  }

  function multipartBody(fields) {
    const body = new FormData();
    for (const [name, value] of fields) body.append(name, value);
    body.append("stream", "true");
    return body;
  }

  function isStream(response) {
    return response.ok && (response.headers.get("Content-Type") ?? "").startsWith("text/event-stream");
  }

  /* The API's error body, or null if the answer is not the API's: a proxy's page, for instance. */
  async function readRefusal(response) {
    try {
      const body = await response.json();
      return body.error?.code ? body : null;
    } catch (error) {
      if (error.name === "AbortError") throw error;
      return null;
    }
  }

  /* The events of a text/event-stream, as {name, data}; see the HTML standard, 9.2.6. Comments, and an event that was
     cut off, are left out. Rejects if the connection breaks. */
  async function* readEvents(body) {
    let name = "";
    let data = [];
    for await (const line of readLines(body)) {
      const [, field, value] = line.match(/^([^:]*):? ?(.*)$/s);
      if (line === "") {
        if (data.length) yield { name, data: data.join("\n") };
        name = "";
        data = [];
      } else if (field === "event") name = value;
      else if (field === "data") data.push(value);
    }
  }

  /* Whole lines, whichever of the three line ends the stream has, wherever its chunks are cut. */
  async function* readLines(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    try {
      for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
        // A carriage return at the end may be half of a line end.
        const lines = (rest + chunk.value).split(/\r\n|\n|\r(?!$)/);
        rest = lines.pop();
        yield* lines;
      }
    } finally {
      reader.cancel().catch(() => {}); // it may have broken already
    }
  }

  return { canStream, post, isStream, readRefusal, readEvents };
})();
