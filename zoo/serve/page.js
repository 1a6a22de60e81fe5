// The page's side of the JSON API: it sends the chosen picture, and shows the answer.
window.zoo = (() => {
  let picture = null;
  let turns = [];

  const escape = (text) => String(text).replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const count = (number) => (number == null ? "" : number >= 1e9 ? `${(number / 1e9).toFixed(2)} G` : `${(number / 1e6).toFixed(1)} M`);

  function choose(element, file) {
    if (!file) return;
    picture = file;
    forget();
    const chosen = new DataTransfer(); // the input names what is shown, also when it came from elsewhere
    chosen.items.add(file);
    element.querySelector(".zoo-drop input").files = chosen.files;
    const shown = element.querySelector(".zoo-drop img");
    URL.revokeObjectURL(shown.src);
    shown.src = URL.createObjectURL(file);
    shown.hidden = false;
    element.querySelector(".zoo-drop span").hidden = true;
  }

  function attach(element) {
    const drop = element.querySelector(".zoo-drop");
    const input = drop.querySelector("input");
    input.addEventListener("change", () => choose(element, input.files[0]));
    for (const [event, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
      drop.addEventListener(event, (dragged) => {
        dragged.preventDefault();
        drop.classList.toggle("over", over);
        if (event === "drop") choose(element, dragged.dataTransfer.files[0]);
      });
    }
    document.addEventListener("paste", (pasted) => choose(element, pasted.clipboardData.files[0]));
    for (const button of element.querySelectorAll(".zoo-samples button")) {
      button.addEventListener("click", async () => {
        const response = await fetch(`samples/${button.dataset.name}.jpg`);
        if (response.ok) choose(element, new File([await response.blob()], `${button.dataset.name}.jpg`));
      });
    }
  }

  async function ask(task, fields) {
    if (!picture) throw new Error("Choose a picture first, or one of the examples.");
    const form = new FormData();
    form.append("image", picture, "picture"); // the name of the reader's file is nobody's business
    for (const [name, value] of Object.entries(fields)) form.append(name, value);
    let response;
    try {
      response = await fetch(`api/${task}`, { method: "POST", body: form });
    } catch {
      throw new Error("The server cannot be reached.");
    }
    if (!response.ok) {
      const answer = await response.json().catch(() => ({}));
      throw new Error(answer.error || `The server answered ${response.status}.`);
    }
    return response;
  }

  // What Gradio calls at a click: the status, then what `work` makes of the arguments; on an error the blanks.
  const action = (blanks, work) => async (...args) => {
    document.body.setAttribute("aria-busy", "true");
    try {
      return ["", ...(await work(...args))];
    } catch (error) {
      return [`<p role="alert">${escape(error.message)}</p>`, ...blanks];
    } finally {
      document.body.removeAttribute("aria-busy");
    }
  };

  const rows = (head, body) =>
    `<table><thead><tr>${head.map((name) => `<th>${escape(name)}</th>`).join("")}</tr></thead>` +
    `<tbody>${body.map((row) => `<tr>${row.map((cell) => `<td>${escape(cell)}</td>`).join("")}</tr>`).join("")}</tbody></table>`;

  const shown = (drawn, alt, table) =>
    `<div class="zoo-answer"><img src="${escape(drawn)}" alt="${escape(alt)}">${table}</div>`;

  const classify = action([{}], async (model, names) => {
    const answer = await (await ask("classify", { model, top_k: names })).json();
    const confidences = answer.names.map((label, place) => ({ label, confidence: answer.probabilities[place] }));
    return [{ label: answer.names[0], confidences }];
  });

  const detect = action([""], async (score) => {
    const answer = await (await ask("detect", { score, draw: true })).json();
    const found = answer.detections.map((thing) => [thing.name, percent(thing.score)]);
    const alt = found.length ? `The picture with ${found.map((row) => row[0]).join(", ")}` : "The picture, with nothing found";
    return [shown(answer.drawn, alt, found.length ? rows(["Thing", "Score"], found) : "<p>Nothing was found.</p>")];
  });

  const segment = action([""], async () => {
    const answer = await (await ask("segment", { draw: true })).json();
    const found = answer.classes.map((area) => [area.name, percent(area.share)]);
    return [shown(answer.drawn, `The picture with ${found.map((row) => row[0]).join(", ")}`, rows(["Class", "Share"], found))];
  });

  const compare = action([""], async (first, second) => {
    const { models } = await (await ask("compare", { first, second })).json();
    const facts = [
      ["Parameters", ...models.map((model) => count(model.params))],
      ["MACs at 224", ...models.map((model) => count(model.macs))],
      ["ImageNet top-1, published", ...models.map((model) => (model.top1 == null ? "" : `${model.top1}%`))],
      ["Time here", ...models.map((model) => (model.seconds == null ? "" : `${Math.round(1000 * model.seconds)} ms`))],
    ];
    const places = Math.max(...models.map((model) => model.answer?.names.length ?? 1));
    for (let place = 0; place < places; place++) {
      const name = ({ answer }) =>
        answer ? `${answer.names[place] ?? ""} ${percent(answer.probabilities[place] ?? 0)}` : place ? "" : "not served here";
      facts.push([place ? "" : "Names", ...models.map(name)]);
    }
    return [`<div class="zoo-answer">${rows(["", ...models.map((model) => model.model)], facts)}</div>`];
  });

  function line(kind) {
    const talk = document.getElementById("zoo-talk");
    const added = document.createElement("p");
    added.className = kind;
    talk.append(added);
    return added;
  }

  async function* documents(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      text += value ?? "";
      const lines = text.split("\n");
      text = lines.pop();
      for (const one of lines) yield JSON.parse(one);
      if (done) return;
    }
  }

  async function chat(question, keep) {
    const talked = action([question, ""], async () => {
      if (!question.trim()) throw new Error("Write a question first.");
      const response = await ask("chat", { question, keep, turns: JSON.stringify(turns), stream: true });
      line("question").textContent = question;
      const answer = line("answer");
      let last = {};
      for await (last of documents(response)) {
        if (last.error) throw new Error(last.error);
        if (last.text) answer.textContent += last.text;
      }
      if (last.answer === undefined) throw new Error("The answer was cut short.");
      answer.textContent = last.answer;
      turns.push([question, last.answer]);
      const kept = `${last.kept_tokens} of ${last.visual_tokens} visual tokens are seen in the last layer`;
      const overlay = last.overlay ? `<img src="${escape(last.overlay)}" alt="${kept}; the others are dark">` : "";
      return ["", `<div class="zoo-answer">${overlay}<p>${kept}.</p></div>`];
    });
    return talked();
  }

  function forget() {
    turns = [];
    document.getElementById("zoo-talk")?.replaceChildren();
    return ["", ""];
  }

  return { attach, classify, detect, segment, compare, chat, forget };
})();
