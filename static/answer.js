/* Draws what comes back: an answer while it is written, its numbers at the end, errors, and the copy button.

   The panels are the templates of the page, the same that it shows without JavaScript; nothing is made from HTML in
   strings. While an answer is written there are seconds and characters to tell: how many tokens those are is known to
   the service only, which says so at the end. */
"use strict";

const AvitoAnswer = (() => {
  const texts = document.getElementById("cards").dataset;
  const lang = document.documentElement.lang;
  const tickEveryMs = 250;
  const showCopiedMs = 2000;
  // So near to the end of the answer, in pixels, a reader counts as reading along.
  const endMarginPx = 48;

  const fill = (text, values) => text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
  const [whole, tenths, hundredths] = [0, 1, 2].map(
    (digits) => new Intl.NumberFormat(lang, { minimumFractionDigits: digits, maximumFractionDigits: digits }).format,
  );
  const copyOf = (id) => document.getElementById(id).content.firstElementChild.cloneNode(true);

  /* One answer on its way in `outcome`. Call `admit` and `append` as it comes, then exactly one of the others. */
  function begin(outcome) {
    const panel = copyOf("answer-panel");
    const find = (selector) => panel.querySelector(selector);
    const progress = find("[data-progress]");
    const progressText = find("[data-progress-text]");
    const answer = find("[data-answer]").appendChild(document.createTextNode(""));
    const started = performance.now();
    const elapsedS = () => (performance.now() - started) / 1000;
    let phase = texts.textSending;
    let numChars = 0;
    let requestId = "";

    const tell = () => {
      progressText.textContent = fill(phase, { seconds: whole(Math.floor(elapsedS())), count: whole(numChars) });
    };
    tell();
    const ticking = setInterval(tell, tickEveryMs);
    outcome.replaceChildren(panel);
    outcome.setAttribute("aria-busy", "true");
    outcome.scrollIntoView({ block: "nearest", behavior: "instant" });

    function end(change) {
      clearInterval(ticking);
      keepEndInView(outcome, () => {
        progress.classList.add("is-over");
        change();
      });
      outcome.removeAttribute("aria-busy");
      if (numChars) offerCopy(panel);
    }

    function endWith(error) {
      end(() => {
        if (numChars) {
          progress.hidden = true;
          outcome.append(error);
        } else outcome.replaceChildren(error);
      });
      return error;
    }

    return {
      admit(response) {
        requestId = response.headers.get("X-Request-ID") ?? "";
        find("[data-demo]").hidden = response.headers.get("X-Avito-Demo") !== "1";
        phase = texts.textWaiting;
        tell();
      },
      append(text) {
        keepEndInView(outcome, () => answer.appendData(text));
        numChars += [...text].length;
        phase = texts.textWriting;
        tell();
      },
      complete(body) {
        end(() => {
          progress.hidden = true;
          find("[data-empty]").hidden = body.data.text !== "";
          find("[data-demo]").hidden = !body.data.demo;
          showFacts(panel, factsOf(body));
        });
      },
      stop() {
        end(() => {
          const values = { seconds: tenths(elapsedS()), count: whole(numChars) };
          progressText.textContent = fill(texts.textStoppedAfter, values);
          showFacts(panel, { request_id: requestId });
        });
      },
      /* An error of the API, before the stream or in it. Returns its panel. */
      fail: (body) => endWith(errorPanel(body.error, body.request_id)),
      /* No answer, or one that the connection cut off. Returns the panel that says so. */
      breakOff: () => endWith(errorPanel({ code: numChars ? "broken" : "network" }, requestId)),
      hasText: () => numChars > 0,
    };
  }

  /* Follow the text only for a reader who was at its end; everybody else keeps what they are reading in place. */
  function keepEndInView(outcome, change) {
    const belowPx = () => outcome.getBoundingClientRect().bottom - window.innerHeight;
    const wasAtEnd = belowPx() <= endMarginPx;
    change();
    if (wasAtEnd && belowPx() > 0) window.scrollBy({ top: belowPx() + endMarginPx / 2, behavior: "instant" });
  }

  function factsOf({ data, metrics, request_id }) {
    const seconds = (value) => (value === null ? "" : fill(texts.textSeconds, { value: hundredths(value) }));
    return {
      generated_tokens: whole(data.generated_tokens),
      input_tokens: whole(data.input_tokens),
      total_time: seconds(metrics.total_time),
      time_to_first_token: seconds(metrics.time_to_first_token),
      tokens_per_second: fill(texts.textPerSecond, { value: tenths(metrics.tokens_per_second) }),
      finish_reason: data.finish_reason,
      request_id,
    };
  }

  /* A fact without a value is left out. */
  function showFacts(panel, values) {
    const facts = panel.querySelector(".facts");
    for (const fact of facts.querySelectorAll("[data-fact]")) {
      const value = values[fact.dataset.fact];
      const shown = fact.querySelector("dd");
      if (!value) fact.remove();
      else if (shown.childElementCount) for (const word of shown.children) word.hidden = word.dataset.when !== value;
      else shown.textContent = value;
    }
    facts.hidden = !facts.childElementCount;
  }

  function errorPanel({ code, message, field }, requestId) {
    const panel = copyOf("error-panel");
    const fieldName = (field ?? "").split("[")[0];
    const words = wordsFor(code, fieldName);
    panel.dataset.errorField = fieldName;
    panel.querySelector(".panel-title").textContent = words.dataset.title;
    panel.querySelector(".panel-hint").textContent = words.textContent;
    // Those of the connection are told by the page, not by the service: they have no code and no message.
    showFacts(panel, { message, code: message && code, request_id: requestId });
    return panel;
  }

  /* Title and hint: for a field that has its own, else for the code; a code that the page does not know is told as a
     fault of the service. */
  function wordsFor(code, field) {
    const all = [...document.getElementById("error-texts").content.children];
    const found = (wantedCode, wantedField) =>
      all.find(({ dataset }) => dataset.code === wantedCode && (dataset.field ?? "") === wantedField);
    return found(code, field) ?? found(code, "") ?? found("internal_error", "");
  }

  function offerCopy(panel) {
    const button = panel.querySelector("[data-copy]");
    const answer = panel.querySelector("[data-answer]");
    if (!button || !answer?.textContent) return;
    const label = button.textContent;
    const status = button.closest("[data-model]").querySelector("[data-status]");
    button.hidden = false;
    button.addEventListener("click", async () => {
      if (!(await copy(answer.textContent, button))) {
        getSelection().selectAllChildren(answer); // refused by the browser: one keystroke is left to the reader
        return;
      }
      button.textContent = status.textContent = texts.textCopied;
      setTimeout(() => { button.textContent = label; }, showCopiedMs);
    });
  }

  async function copy(text, button) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      return copyBySelection(text, button); // browsers offer the clipboard on HTTPS and localhost only
    }
  }

  function copyBySelection(text, button) {
    const area = document.createElement("textarea");
    area.className = "hidden-text";
    area.readOnly = true;
    area.value = text;
    button.after(area);
    area.focus({ preventScroll: true });
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    button.focus({ preventScroll: true });
    return isCopied;
  }

  return { begin, offerCopy, fill };
})();
