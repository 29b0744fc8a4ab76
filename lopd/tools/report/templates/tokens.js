(() => {
  const panel = document.getElementById("panel");
  let chosen = null;
  const show = (token) => {
    if (chosen) chosen.classList.remove("on");
    chosen = token;
    token.classList.add("on");
    panel.hidden = false;
    panel.replaceChildren();
    const text = document.createElement("b");
    text.textContent = token.textContent;
    panel.append(text);
    for (const [name, value] of Object.entries(token.dataset)) {
      const fact = document.createElement("span");
      fact.textContent = `${name} ${value}`;
      panel.append(fact);
    }
  };
  for (const kind of ["mouseover", "focusin", "click"])
    document.addEventListener(kind, (event) => event.target.classList?.contains("t") && show(event.target));
  document.addEventListener("keydown", (event) => {
    const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    let next = step && chosen?.[step];
    while (next && !next.classList.contains("t")) next = next[step];
    if (!next) return;
    event.preventDefault();
    next.tabIndex = 0;
    next.focus();
  });
})();
