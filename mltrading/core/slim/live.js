// What pages with something of the class `live` can do beyond being read: a read-out for timelines, order and search for tables.
(() => {
  for (const chart of document.querySelectorAll(".live.timeline")) {
    const told = JSON.parse(chart.querySelector("script").textContent), last = told.at.length - 1;
    const lanes = chart.querySelector(".lanes"), time = chart.querySelector(".reading time"), values = chart.querySelectorAll(".reading b");
    const cursor = lanes.appendChild(document.createElement("i"));
    let now = last;
    cursor.className = "cursor";
    const show = (k, seen) => {
      now = Math.max(0, Math.min(last, k));
      time.textContent = told.at[now];
      values.forEach((value, row) => { value.textContent = told.rows[row][now]; });
      cursor.style.left = `${100 * (now + 0.5) / (last + 1)}%`;
      cursor.hidden = !seen;
    };
    const point = event => {
      const box = lanes.getBoundingClientRect();
      show(Math.floor((event.clientX - box.left) / box.width * (last + 1)), true);
    };
    const rest = () => show(last, false);
    lanes.addEventListener("pointermove", point);
    lanes.addEventListener("pointerdown", point);
    lanes.addEventListener("pointerleave", rest);
    chart.addEventListener("blur", rest);
    chart.addEventListener("keydown", event => {
      const to = { ArrowLeft: now - 1, ArrowRight: now + 1, PageUp: now - 21, PageDown: now + 21, Home: 0, End: last }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      show(to, true);
    });
    chart.tabIndex = 0;
    rest();
  }
  const worth = cell => {
    const text = cell.textContent.trim(), number = Number(text.replace(/−/g, "-").replace(/[,+]/g, ""));
    return text === "—" ? [2, 0] : Number.isNaN(number) ? [1, text] : [0, number];
  };
  const less = (a, b) => a[0] - b[0] || (a[1] < b[1] ? -1 : a[1] > b[1] ? 1 : 0);
  for (const table of document.querySelectorAll("table.live.sortable")) {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], lines = [...body.rows];
    const sort = (head, column) => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach(h => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = lines.map(line => [worth(line.cells[column]), line]);
      keyed.sort((a, b) => (a[0][0] === 2) - (b[0][0] === 2) || (down ? less(b[0], a[0]) : less(a[0], b[0])));
      body.append(...keyed.map(pair => pair[1]));
    };
    heads.forEach((head, column) => {
      head.tabIndex = 0;
      head.addEventListener("click", () => sort(head, column));
      head.addEventListener("keydown", event => { if (event.key === "Enter") sort(head, column); });
    });
    const label = document.createElement("label"), input = label.appendChild(document.createElement("input"));
    label.className = "search";
    label.prepend("Show rows with");
    input.type = "search";
    input.addEventListener("input", () => {
      const wanted = input.value.toLowerCase();
      lines.forEach(line => { line.hidden = !line.textContent.toLowerCase().includes(wanted); });
    });
    const frame = table.closest(".scroll") ?? table;
    frame.before(label);
    if (lines.length > 15) frame.classList.add("tall");
  }
})();
