/* What the start page does better with JavaScript. Without it both forms work as plain HTML.

   With it a form goes to the JSON API, and its answer grows on the page as it is made: stream.js sends and reads,
   answer.js draws, and here it is decided what happens when. Chosen pictures stay chosen, and "Stop" closes the
   connection, upon which the server ends the generation. Every sentence comes from data-text-* of #cards and the
   templates beside it, every limit from data-max-*. */
"use strict";

(() => {
  const page = document.getElementById("cards");
  const { fill } = AvitoAnswer;
  const texts = page.dataset;
  const maxPromptChars = Number(texts.maxPromptChars);
  const maxImages = Number(texts.maxImages);
  const maxBodyBytes = Number(texts.maxBodyBytes);
  // Room for the other fields and the multipart frame around the pictures.
  const maxImageBytes = maxBodyBytes - 4096;
  const pollEveryMs = 2000;
  const numbers = new Intl.NumberFormat(document.documentElement.lang);

  const cards = [...page.querySelectorAll("[data-model]")].map(enhanceCard);

  if (cards.some((card) => card.state() === "loading")) setTimeout(pollStates, pollEveryMs);

  function enhanceCard(root) {
    const find = (selector) => root.querySelector(selector);
    const form = find("form");
    const outcome = find("[data-outcome]");

    countCharacters(find("[data-counter]"), form.elements.prompt);
    if (find("[data-pictures]")) enhancePictures(root, form);
    if (AvitoStream.canStream) enhanceForm(root, form, outcome);
    AvitoAnswer.offerCopy(outcome);
    // Without this only keyboards that reach the anchor by themselves would land on what came back.
    if (location.hash === `#${outcome.id}` && outcome.childElementCount) outcome.focus();

    return {
      name: root.dataset.model,
      state: () => root.dataset.state,
      setState(state) {
        root.dataset.state = state;
        for (const note of root.querySelectorAll(":scope > .note[data-when]")) note.hidden = note.dataset.when !== state;
        form.querySelector("fieldset").disabled = state === "failed" || state === "not_configured";
        for (const badge of document.querySelectorAll(`[data-badge="${root.dataset.model}"]`)) {
          badge.dataset.state = state;
          for (const word of badge.children) word.hidden = word.dataset.when !== state;
        }
      },
    };
  }

  function enhanceForm(root, form, outcome) {
    const submit = root.querySelector("[data-submit]");
    const stop = root.querySelector("[data-stop]");
    const status = root.querySelector("[data-status]");
    let running = null; // AbortController of the request under way
    // A long answer pushes the button out of sight: then there is one at the end of the text.
    const farStop = new IntersectionObserver(([entry]) => {
      const below = outcome.querySelector("[data-stop-below]");
      if (running && below) below.hidden = entry.isIntersecting;
    });

    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!running) send();
    });
    form.elements.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) form.requestSubmit(submit);
    });
    // It stands where the other button was: the second half of a double click, or a key held down, means that one.
    stop.addEventListener("keydown", (event) => {
      if (event.repeat) event.preventDefault();
    });
    stop.addEventListener("click", (event) => {
      if (event.detail < 2) running?.abort();
    });
    outcome.addEventListener("click", (event) => {
      if (event.target.closest("[data-stop-below]")) running?.abort();
    });
    document.addEventListener("keydown", (event) => {
      const focusedCard = document.activeElement?.closest("[data-model]");
      const isElsewhere = focusedCard && focusedCard !== root;
      if (event.key === "Escape" && !event.isComposing && !isElsewhere) running?.abort();
    });
    // A page that comes back from the browser's cache must not look busy for a request that is long gone.
    window.addEventListener("pagehide", () => running?.abort());

    async function send() {
      const controller = new AbortController();
      running = controller;
      const answer = AvitoAnswer.begin(outcome);
      showRunning();
      try {
        await follow(answer, controller.signal);
      } catch {
        if (controller.signal.aborted) {
          answer.stop();
          status.textContent = texts.textStopped;
        } else showError(answer, answer.breakOff());
      } finally {
        running = null;
        showResting();
      }
    }

    /* From the request to the end of its answer. Rejects if the connection breaks or is closed by "Stop". */
    async function follow(answer, signal) {
      const response = await AvitoStream.post(form, signal);
      if (!AvitoStream.isStream(response)) {
        const refusal = await AvitoStream.readRefusal(response);
        return showError(answer, refusal ? answer.fail(refusal) : answer.breakOff());
      }
      answer.admit(response);
      for await (const { name, data } of AvitoStream.readEvents(response.body)) {
        const body = JSON.parse(data);
        if (name === "delta") {
          if (!answer.hasText()) status.textContent = texts.textBegun;
          answer.append(body.text);
        } else if (name === "done") {
          answer.complete(body);
          status.textContent = texts.textAnswered;
          return;
        } else if (name === "error") return showError(answer, answer.fail(body));
      }
      throw new Error("the stream ended without its end");
    }

    function showRunning() {
      markField("");
      status.textContent = texts.textWorking;
      const hadFocus = document.activeElement === submit;
      submit.disabled = submit.hidden = true;
      stop.hidden = false;
      if (hadFocus) stop.focus({ preventScroll: true });
      farStop.observe(stop);
    }

    function showResting() {
      const focused = document.activeElement;
      const hadFocus = focused === stop || focused.matches("[data-stop-below]");
      farStop.disconnect();
      submit.disabled = submit.hidden = false;
      stop.hidden = true;
      for (const below of outcome.querySelectorAll("[data-stop-below]")) below.remove();
      // Whoever has gone on to something else meanwhile is left there.
      if (hadFocus) outcome.focus({ preventScroll: true });
    }

    function showError(answer, panel) {
      markField(panel.dataset.errorField);
      status.textContent = answer.hasText() ? texts.textIncomplete : texts.textRefused;
    }

    function markField(name) {
      for (const field of [...form.elements].filter((element) => element.name)) {
        const described = new Set((field.getAttribute("aria-describedby") ?? "").split(" ").filter(Boolean));
        described.delete(outcome.id);
        if (field.name === name) described.add(outcome.id);
        setOrRemove(field, "aria-invalid", field.name === name ? "true" : "");
        setOrRemove(field, "aria-describedby", [...described].join(" "));
      }
    }
  }

  function withText(tag, className, text) {
    const element = document.createElement(tag);
    element.className = className;
    element.textContent = text;
    return element;
  }

  function setOrRemove(element, attribute, value) {
    if (value) element.setAttribute(attribute, value);
    else element.removeAttribute(attribute);
  }

  function countCharacters(counter, prompt) {
    const count = () => {
      // Code points, as the server counts; `length` would count an emoji twice.
      const excess = [...prompt.value].length - maxPromptChars;
      const text = excess > 0
        ? fill(texts.textCounterOver, { count: numbers.format(excess) })
        : fill(texts.textCounter, { count: numbers.format(excess + maxPromptChars), limit: numbers.format(maxPromptChars) });
      counter.textContent = text;
      counter.classList.toggle("is-over", excess > 0);
      prompt.setCustomValidity(excess > 0 ? text : "");
    };
    counter.hidden = false;
    prompt.addEventListener("input", count);
    window.addEventListener("pageshow", count); // the browser may have restored a text
    count();
  }

  function enhancePictures(root, form) {
    const input = form.elements.image;
    const drop = input.closest(".drop");
    const thumbs = root.querySelector("[data-thumbs]");
    const problem = root.querySelector("[data-pictures-error]");
    const accepted = input.accept.split(",");
    let pictures = []; // what `input.files` holds, in order
    let urls = [];
    let sampleTurn = 0;

    drop.classList.add("is-enhanced");
    root.querySelector("[data-drop-label]").hidden = false;
    if (input.files.length) add([...input.files]);
    const samples = [...root.querySelectorAll("[data-sample]")];
    for (const hint of root.querySelectorAll("[data-sample-save]")) hint.hidden = true; // a click does it
    for (const sample of samples) sample.addEventListener("click", (event) => trySample(event, sample));

    input.addEventListener("change", () => add([...input.files]));

    // The whole page takes pictures: one that misses the box must not replace the page in the browser.
    const isOn = () => !form.querySelector("fieldset").disabled;
    const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
    document.addEventListener("dragover", (event) => {
      if (!carriesFiles(event)) return;
      event.preventDefault();
      drop.classList.toggle("is-over", isOn());
    });
    document.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) drop.classList.remove("is-over");
    });
    document.addEventListener("drop", (event) => {
      if (!carriesFiles(event)) return;
      event.preventDefault();
      drop.classList.remove("is-over");
      if (isOn()) add([...event.dataTransfer.files]);
    });
    document.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])].filter((file) => file.type.startsWith("image/"));
      if (!files.length || !isOn()) return;
      event.preventDefault();
      add(files);
    });

    // The drawing becomes the chosen picture. Its question too, unless the reader has written one.
    async function trySample(event, sample) {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return; // in a window of its own
      event.preventDefault();
      if (!isOn() || form.querySelector("[data-submit]").disabled) return;
      const turn = ++sampleTurn;
      try {
        const response = await fetch(sample.href);
        if (!response.ok) throw new Error(response.statusText);
        const blob = await response.blob();
        if (turn !== sampleTurn) return; // another was clicked meanwhile
        choose([new File([blob], sample.dataset.sample, { type: blob.type })], "");
      } catch {
        problem.textContent = texts.textNetworkHint;
        problem.hidden = false;
        return;
      }
      const { prompt } = form.elements;
      const isOurs = !prompt.value.trim() || samples.some((other) => other.dataset.question === prompt.value);
      if (isOurs) {
        prompt.value = sample.dataset.question;
        prompt.dispatchEvent(new Event("input", { bubbles: true }));
      }
      root.querySelector("[data-status]").textContent = texts.textSampleChosen;
      form.querySelector("[data-submit]").focus();
    }

    function add(files) {
      let message = "";
      const next = [...pictures];
      for (const file of files) {
        const bytes = [...next, file].reduce((sum, one) => sum + one.size, 0);
        // An unknown type is left to the server, which looks at the bytes.
        if (file.type && !accepted.includes(file.type)) message = fill(texts.textImageType, { name: file.name });
        else if (next.length >= maxImages) message = fill(texts.textImageCount, { limit: numbers.format(maxImages) });
        else if (bytes > maxImageBytes) {
          message = fill(texts.textImageSize, { size: megabytes(bytes, Math.ceil), limit: megabytes(maxBodyBytes, Math.floor) });
        } else next.push(file);
      }
      choose(next, message);
    }

    function choose(files, message) {
      pictures = files;
      const transfer = new DataTransfer();
      for (const file of files) transfer.items.add(file);
      input.files = transfer.files;
      problem.textContent = message;
      problem.hidden = !message;
      for (const url of urls) URL.revokeObjectURL(url);
      urls = files.map((file) => URL.createObjectURL(file));
      thumbs.replaceChildren(...files.map(thumb));
      thumbs.hidden = !files.length;
    }

    function thumb(file, index) {
      const item = document.createElement("li");
      const image = document.createElement("img");
      image.src = urls[index];
      image.alt = "";
      const remove = withText("button", "", "×");
      remove.type = "button";
      remove.setAttribute("aria-label", fill(texts.textImageRemove, { name: file.name }));
      remove.addEventListener("click", () => {
        choose(pictures.filter((_, other) => other !== index), "");
        (thumbs.querySelectorAll("button")[Math.min(index, pictures.length - 1)] ?? input).focus();
      });
      item.append(image, withText("span", "", file.name), remove);
      return item;
    }

    // One decimal, rounded so that what is over a limit never reads as the limit itself.
    function megabytes(bytes, round) {
      return numbers.format(round((bytes / 1048576) * 10) / 10);
    }
  }

  async function pollStates() {
    try {
      const response = await fetch("/api/health/ready", { cache: "no-store" });
      const { models } = await response.json(); // 503 has the same body
      for (const card of cards) {
        const state = models[card.name]?.state;
        if (state && state !== card.state()) card.setState(state);
      }
    } catch {
      // The server is restarting, perhaps: the next look will tell.
    }
    if (cards.some((card) => card.state() === "loading")) setTimeout(pollStates, pollEveryMs);
  }
})();
