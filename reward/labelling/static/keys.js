"use strict";
// Keys for the buttons of the page, and judgements that are sent again until the server has them.
// Without this script the buttons are ordinary forms.
(() => {
  const RETRY_MS = 700;
  const PATIENCE_MS = 15000;
  // A key that bounces, or is held down, must not judge a pair that nobody has seen; nor a double click.
  const UNSEEN_MS = 150;
  const notice = document.getElementById("notice");
  let isSending = false;
  let shownAt = performance.now();

  const tell = (text) => {
    notice.textContent = text;
    notice.hidden = !text;
  };
  const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

  // The answer's text with its status, or null when there was none: the server is down, or was killed meanwhile.
  const ask = async (url, body) => {
    try {
      const options = { method: "POST", body, signal: AbortSignal.timeout(PATIENCE_MS) };
      const answer = await fetch(url, options);
      return { ok: answer.ok, html: await answer.text() };
    } catch {
      return null;
    }
  };

  const show = (html) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    const fresh = document.adoptNode(page.getElementById("live"));
    const focused = document.activeElement?.dataset.keys;
    document.getElementById("live").replaceWith(fresh);
    if (focused) fresh.querySelector(`button[data-keys="${focused}"]`)?.focus({ preventScroll: true });
    document.title = page.title;
    window.scrollTo(0, 0);
    shownAt = performance.now();
  };

  const send = async (form, button) => {
    isSending = true;
    button.classList.add("pressed");
    const body = new URLSearchParams(new FormData(form, button));
    let answer = await ask(form.action, body);
    while (answer === null) {
      tell("The server does not answer. Your judgement is kept here and sent again; please leave this page open.");
      await pause(RETRY_MS);
      answer = await ask(form.action, body);
    }
    isSending = false;
    button.classList.remove("pressed");
    if (answer.ok) {
      tell("");
      show(answer.html);
    } else {
      const page = new DOMParser().parseFromString(answer.html, "text/html");
      tell(page.getElementById("message")?.textContent ?? "The server did not take this judgement.");
    }
  };

  document.addEventListener("submit", (event) => {
    if (!event.target.matches("form.live")) return;
    event.preventDefault();
    const isSeen = performance.now() - shownAt >= UNSEEN_MS;
    if (!isSending && isSeen && event.submitter) send(event.target, event.submitter);
  });

  document.addEventListener("click", (event) => {
    if (event.detail > 1 && event.target.closest("button[name=choice]")) event.preventDefault();
  });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (event.target.closest?.("input, textarea, select")) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const isMeant = (button) => button.dataset.keys.split(" ").includes(key);
    const button = [...document.querySelectorAll("button[data-keys]")].find(isMeant);
    if (button && !event.repeat) button.click();
    if (button || (event.repeat && event.target.closest?.("button"))) event.preventDefault();
  });

  window.addEventListener("beforeunload", (event) => {
    if (isSending) event.preventDefault();
  });
})();
