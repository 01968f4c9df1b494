// Draws the figures and the rows. Whatever comes from the data is set as text, never as HTML.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const all = (selector) => [...document.querySelectorAll(selector)];

  function element(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  // One of several buttons is on. `then` hears its value; the answer is a function that tells it.
  function choice(name, then) {
    const buttons = all(`[data-switch="${name}"] button`);
    for (const button of buttons) {
      button.addEventListener("click", () => {
        for (const other of buttons) other.setAttribute("aria-pressed", other === button);
        then();
      });
    }
    return () => buttons.find((button) => button.getAttribute("aria-pressed") === "true")?.dataset.value;
  }

  // -- figures

  const SHAPES = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x"];
  const DASHES = ["solid", "6px,3px", "2px,2px", "8px,2px,2px,2px"];
  const percent = data.percent;

  // Plotly reads a little HTML in texts.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const shape = (at) => SHAPES[at % SHAPES.length];
  const dash = (at) => DASHES[Math.floor(at / data.hues) % DASHES.length];

  // A custom property as the theme in force has it.
  const probe = document.body.appendChild(element("i", { hidden: "" }));
  function colour(name) {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  }
  const hue = (at) => colour(`hue-${at % data.hues}`);
  const faded = (shade, alpha) => shade.replace(/^rgb\((.*)\)$/, `rgba($1, ${alpha})`);
  const written = (metric, value) => (data.percents.includes(metric) ? `${(100 * value).toFixed(1)}%` : value.toPrecision(4));

  function draw(id, traces, xaxis, yaxis) {
    const plot = document.getElementById(id);
    const font = { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("quiet") };
    const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, fixedrange: true };
    const layout = {
      font,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: MARGIN,
      width: plot.clientWidth,
      height: plot.clientHeight,
      showlegend: false,
      dragmode: false,
      hovermode: "closest",
      hoverlabel: { bgcolor: colour("sheet"), bordercolor: colour("line"), font: { ...font, color: colour("ink") } },
      xaxis: { ...axis, showgrid: false, ...xaxis, title: { text: xaxis.title, standoff: 12, font: { size: 13 } } },
      yaxis: { ...axis, ...yaxis },
    };
    Plotly.react(plot, traces, layout, { displayModeBar: false });
  }
  const MARGIN = { l: 56, r: 16, t: 16, b: 56 };

  // The range of an axis with room at its ends, in its own units: powers of ten where it is logarithmic.
  function range(values, kind, room) {
    const known = values.filter((value) => value !== null).map((value) => (kind === "log" ? Math.log10(value) : value));
    const low = Math.min(...known);
    const high = Math.max(...known);
    const pad = room * (high - low || Math.abs(high) || 1);
    return [low - pad, high + pad];
  }

  // Ticks of a logarithmic axis: at 1, 2 and 5 where there is room for them.
  function scale(type, range, width) {
    const decades = range[1] - range[0];
    if (type !== "log" || decades < 1) return { type, range };
    return { type, range, dtick: width / decades < 150 ? 1 : "D2", exponentformat: "e", tickformat: range[0] < -3 ? "~e" : "~g" };
  }

  // For each point the first place of its name that is free of points, names and, if it can be, of lines; or none.
  function labelled(points, front, width, height) {
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = `13px ${getComputedStyle(document.body).fontFamily}`;
    const taken = points.map(({ x, y }) => [x - 7, y - 7, x + 7, y + 7]);
    const lines = points.map(({ x, low, high }) => [x - 2, high, x + 2, low]);
    points.slice(1, front).forEach((end, at) => {
      for (let part = 0; part < 1; part += 0.02) {
        const [x, y] = ["x", "y"].map((axis) => points[at][axis] + part * (end[axis] - points[at][axis]));
        lines.push([x - 2, y - 2, x + 2, y + 2]);
      }
    });
    const meets = (box) => (other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3];
    const places = ({ x, y, text }) => {
      const wide = pen.measureText(text).width + 4;
      const [left, right] = [x - 4 - wide, x + 4];
      return Object.entries({
        "bottom right": [right, y + 7], "top right": [right, y - 25], "middle right": [right + 4, y - 9],
        "bottom left": [left, y + 7], "top left": [left, y - 25], "middle left": [left - 4, y - 9],
      }).map(([place, [x, y]]) => [place, [x, y, x + wide, y + 18]])
        .filter(([, [x, y, end, bottom]]) => x > 0 && y > 0 && end < width + MARGIN.r && bottom < height)
        .filter(([, box]) => !taken.some(meets(box)));
    };
    return points.map((point) => {
      const free = places(point);
      const [place, box] = free.find(([, box]) => !lines.some(meets(box))) ?? free[0] ?? [null];
      if (box) taken.push(box);
      return place;
    });
  }

  function drawCost() {
    const cost = costShown();
    if (!cost) return;
    for (const text of all("[data-cost]")) text.hidden = text.dataset.cost !== cost;
    const { points, front, axis } = data.costs[cost];
    // Whoever is on the front is named first, while there is room.
    const shown = [...new Set([...front, ...points])].map((at) => ({ at, ...data.candidates[at] }));
    const x = (candidate) => candidate[cost] * (cost === "peak_memory_bytes" ? 2 ** -20 : 1);
    const spread = ({ mean, interval }) => interval ?? [mean, mean];
    const across = range(shown.map(x), axis, 0.1);
    const up = range(shown.flatMap(spread), "linear", 0.06);

    const plot = document.getElementById("plot-cost");
    const width = plot.clientWidth - MARGIN.l - MARGIN.r;
    const height = plot.clientHeight - MARGIN.t - MARGIN.b;
    const down = (value) => (height * (up[1] - value)) / (up[1] - up[0]);
    const places = labelled(
      shown.map((candidate) => ({
        x: (width * ((axis === "log" ? Math.log10(x(candidate)) : x(candidate)) - across[0])) / (across[1] - across[0]),
        y: down(candidate.mean),
        low: down(spread(candidate)[0]),
        high: down(spread(candidate)[1]),
        text: candidate.short,
      })), front.length, width, height,
    );
    const unit = { trainable_parameters: "trained parameters", peak_memory_bytes: "MiB", seconds: "seconds" }[cost];
    const traces = shown.map((candidate, place) => ({
      x: [x(candidate)],
      y: [candidate.mean],
      error_y: {
        type: "data", symmetric: false, array: [spread(candidate)[1] - candidate.mean],
        arrayminus: [candidate.mean - spread(candidate)[0]], color: faded(hue(candidate.at), 0.6), thickness: 1.5, width: 4,
      },
      mode: places[place] ? "markers+text" : "markers",
      marker: { color: hue(candidate.at), symbol: shape(candidate.at), size: 11 },
      text: [plain(candidate.short)],
      textposition: places[place] ?? "middle right",
      textfont: { color: colour("ink") },
      cliponaxis: false,
      hovertext: [`${plain(candidate.name)}<br>${written(data.metric, candidate.mean)}, ${Math.round(x(candidate)).toLocaleString("en")} ${unit}`],
      hoverinfo: "text",
    }));
    traces.unshift({
      x: front.map((at) => x(data.candidates[at])),
      y: front.map((at) => data.candidates[at].mean),
      mode: "lines",
      line: { color: colour("accent"), width: 2, dash: "3px,4px" },
      hoverinfo: "skip",
    });
    draw("plot-cost", traces,
      { ...scale(axis, across, width), title: unit, tickformat: "~s" },
      { range: up, tickformat: percent ? ".0%" : "~g" });
  }

  const hidden = new Set();
  const FEW = 12;

  function drawCurves() {
    const metric = metricShown();
    const shown = data.curves.map((curve, at) => ({ ...curve, at })).filter(({ runs, at }) => runs.length && !hidden.has(at));
    for (const [id, figure] of [["plot-training", "train_loss"], ["plot-validation", metric]]) {
      if (!figure) continue;
      const thin = shown.length > FEW ? [] : shown.filter(({ runs }) => runs.length > 1).map(({ runs, at }) => ({
        // All runs of a candidate are one line with gaps.
        x: runs.flatMap((run) => [...run[figure].keys()].map((epoch) => epoch + 1).concat(null)),
        y: runs.flatMap((run) => run[figure].concat(null)),
        mode: "lines",
        line: { color: faded(hue(at), Math.max(0.12, 0.5 / shown.length)), width: 1 },
        hoverinfo: "skip",
      }));
      const thick = shown.map(({ mean, at }) => ({
        x: [...(mean[figure] ?? []).keys()].map((epoch) => epoch + 1),
        y: mean[figure] ?? [],
        mode: "lines+markers",
        line: { color: hue(at), width: 2.5, dash: dash(at) },
        marker: { color: hue(at), symbol: shape(at), size: 7 },
        hovertext: (mean[figure] ?? []).map((value, epoch) =>
          `${plain(data.candidates[at].name)}<br>epoch ${epoch + 1}: ${value === null ? "–" : written(figure, value)}`),
        hoverinfo: "text",
      }));
      const epochs = Math.max(0, ...shown.flatMap(({ runs }) => runs.map((run) => run[figure].length)));
      draw(id, [...thin, ...thick], { title: "epoch", tick0: 1, dtick: Math.ceil(epochs / 10) || 1 },
        { tickformat: data.percents.includes(figure) ? ".0%" : "~g", ...(figure === "train_loss" && { rangemode: "tozero" }) });
    }
  }

  for (const button of all("[data-candidate]")) {
    button.addEventListener("click", () => {
      const which = button.dataset.candidate;
      for (const other of all("[data-candidate][aria-pressed]")) {
        const at = Number(other.dataset.candidate);
        if (which === "none" || (other === button && !hidden.has(at))) hidden.add(at);
        else if (which === "all" || other === button) hidden.delete(at);
        other.setAttribute("aria-pressed", !hidden.has(at));
      }
      drawCurves();
    });
  }

  function drawSearch(entry, which) {
    const key = searchShown[which]();
    if (!key) return;
    const axis = entry.axes[key];
    const title = plain(entry.titles[key]);
    const kinds = [
      ["kept", (trial) => trial.kept, { symbol: "circle", size: 13, color: colour("accent") }],
      ["ran to the end", (trial) => !trial.kept && trial.status === "done", { symbol: "circle", size: 9, color: colour("quiet") }],
      ["stopped early", (trial) => !trial.kept && trial.status !== "done",
        { symbol: "x-thin-open", size: 9, color: colour("quiet"), line: { width: 2, color: colour("quiet") } }],
    ];
    const traces = kinds.map(([name, belongs, marker]) => {
      const own = [...entry.trials.keys()].filter((at) => belongs(entry.trials[at]) && entry.trials[at].value !== null);
      return {
        name,
        marker,
        mode: "markers",
        x: own.map((at) => axis.values[at]),
        y: own.map((at) => entry.trials[at].value),
        hovertext: own.map((at) => `${plain(entry.trials[at].name)}<br>${written(data.metric, entry.trials[at].value)}, ${title} ${plain(axis.values[at])}`),
        hoverinfo: "text",
      };
    });
    const plot = document.getElementById(`plot-search-${which}`);
    const across = axis.kind === "category" ? {} : scale(axis.kind, range(axis.values, axis.kind, 0.06), plot.clientWidth);
    draw(plot.id, traces, { ...across, title }, { tickformat: percent ? ".0%" : "~g" });
  }

  const costShown = choice("cost", drawCost);
  const metricShown = choice("metric", drawCurves);
  const searchShown = data.search.map((entry, which) => choice(`search-${which}`, () => drawSearch(entry, which)));

  function drawAll() {
    drawCost();
    if (data.curves.some(({ runs }) => runs.length)) drawCurves();
    data.search.forEach(drawSearch);
  }

  // -- rows

  const PAGE = innerWidth < 700 ? 10 : 25;
  const { texts, targets, predictions, finalists, answers, figures, base, better, numbers } = data.rows;
  // Full-width and half-width forms are one to a reader who searches.
  const folded = (text) => text.normalize("NFKC").toLowerCase();
  const haystack = texts.map(({ text }) => folded(text));
  let page = 0;

  const KINDS = {
    all: () => true,
    disagree: (row) => new Set(predictions.map((own) => own[row]?.[0])).size > 1,
    wrong: (row) => predictions.some((own) => own[row]?.[2]),
  };

  // Rows by their finalists' figures, the best first; those without one come last in any order.
  const known = texts.map((_, row) => figures.map((own) => own[row] ?? null).filter((value) => value !== null));
  const sign = better === "higher" ? 1 : -1;
  const mean = (row) => sign * (known[row].reduce((sum, value) => sum + value, 0) / known[row].length);
  const ORDERS = {
    best: (row) => -mean(row),
    worst: mean,
    apart: (row) => Math.min(...known[row]) - Math.max(...known[row]),
    file: (row) => row,
  };

  function ordered(rows) {
    const place = ORDERS[orderShown() ?? "file"];
    const last = (row) => orderShown() !== "file" && known[row].length === 0;
    return orderShown() ? rows.sort((a, b) => last(a) - last(b) || (last(a) ? 0 : place(a) - place(b)) || a - b) : rows;
  }

  function answer(at) {
    const { text, lang } = answers[at];
    return element("bdi", { lang, ...(text.length > 600 && { class: "long", tabindex: "0" }) }, text);
  }

  // What somebody says of a row: the answer, and how sure it is or how good.
  function told(label, said, figure) {
    const cell = element("td", { "data-label": label });
    if (!said) return cell.append("–"), cell;
    const [text, sure, wrong] = said;
    const noted = [sure, figure].filter((value) => value !== null && value !== undefined);
    // Where a figure says how wrong it is, the cross alone is marked: a long text would be all red.
    const red = { class: "wrong" };
    const cross = wrong ? [element("span", red, "✗ ")] : [];
    const words = element("span", wrong && (figure ?? null) === null ? red : {}, ...cross, answer(text));
    const quiet = noted.flatMap((value) => [" ", element("span", { class: "quiet" }, value.toFixed(2))]);
    cell.append(element("span", {}, words, ...quiet));
    return cell;
  }

  function cells(row) {
    const { text, lang } = texts[row];
    const long = text.length > 600;
    const words = element("span", { lang, dir: "auto", ...(long && { class: "long", tabindex: "0" }) }, text);
    return [
      element("td", { class: "end", "data-label": "row" }, String(numbers ? numbers[row] : row + 1)),
      element("td", { class: "text" }, words),
      element("td", { "data-label": "truth" }, answer(targets[row])),
      ...(base.length ? [told("the base, not trained", base[row], data.rows.base_figures[row])] : []),
      ...finalists.map((at, own) => told(data.candidates[at].name, predictions[own][row], figures[own][row])),
    ];
  }

  function showRows() {
    const wanted = folded(document.getElementById("search-text").value.trim());
    const found = ordered([...texts.keys()].filter((row) => KINDS[filterShown()](row) && haystack[row].includes(wanted)));
    page = Math.max(0, Math.min(page, Math.ceil(found.length / PAGE) - 1));
    const shown = found.slice(page * PAGE, (page + 1) * PAGE);
    document.querySelector("#predictions tbody").replaceChildren(...shown.map((row) => element("tr", {}, ...cells(row))));
    document.getElementById("page").textContent = found.length
      ? `${page * PAGE + 1} to ${page * PAGE + shown.length} of ${found.length} rows` : "no row fits";
    document.getElementById("previous").disabled = page === 0;
    document.getElementById("next").disabled = (page + 1) * PAGE >= found.length;
  }

  const first = () => ((page = 0), showRows());
  const filterShown = choice("filter", first);
  const orderShown = choice("order", first);
  if (finalists.length) {
    document.getElementById("search-text").addEventListener("input", first);
    document.getElementById("previous").addEventListener("click", () => (page--, showRows()));
    document.getElementById("next").addEventListener("click", () => (page++, showRows()));
    showRows();
  }

  // -- the page

  const preferred = matchMedia("(prefers-color-scheme: dark)");
  const toggle = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : preferred.matches);
  function themed() {
    toggle.textContent = isDark() ? "Light theme" : "Dark theme";
    drawAll();
  }
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    themed();
  });
  preferred.addEventListener("change", themed);
  matchMedia("print").addEventListener("change", drawAll); // on paper all is light, and as wide as the sheet

  for (const button of all("[data-copy]")) {
    button.addEventListener("click", () => {
      // The clipboard's own interface is closed to files in some browsers; a selection is not.
      getSelection().selectAllChildren(document.getElementById(button.dataset.copy));
      button.textContent = document.execCommand("copy") ? "copied" : "selected";
    });
  }

  let width = innerWidth;
  addEventListener("resize", () => {
    if (width !== innerWidth) drawAll(); // a phone's address bar changes the height alone
    width = innerWidth;
  });
  themed();
})();
