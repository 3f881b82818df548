// The page of a recording: reads the data in the page, keeps what is filtered, draws the timeline and the tables from both.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const fail = (what) => {
    $("failure").hidden = false;
    $("failure").textContent = `This page does not work as it should: ${what}`;
  };
  window.addEventListener("error", (event) => fail(event.message));

  // ---- the data ----

  const data = JSON.parse($("data").textContent);
  const meta = data.meta;
  const WRITE = 1, READ = 2, PRE = 1;
  const MSR = 0, ACCESS = 1, STAGE = 2, EVENT = 3, PROCESS = 4, OUTCOME = 5; // of a series
  const NAMED = 8; // MSRs that have a colour of their own
  const ALL = -1;

  // Times stand there as differences.
  const summed = (steps, width) => {
    let sum = 0;
    return steps.map((step) => (sum += step) * width);
  };
  const [trapTimes, trapCores, trapSeries, trapValues, trapPlaces] = [summed(data.traps[0], 1), ...data.traps.slice(1)];
  const [changeTimes, changeCores, changeMsrs, changeProcesses, changeTexts, changeKnown] = [
    summed(data.changes[0], 1), ...data.changes.slice(1),
  ];
  // What is counted: each trap, or cells of many; where processes do not matter, cells that are finer in time. Both begin and end
  // together: the length of one is the other's times a power of two, and what is in view is always whole cells of the longer.
  const cellsOf = ([series, core, steps, count], width) => ({ series, core, time: summed(steps, width), width, of: (i) => count[i] });
  const whole = meta.exact
    ? { series: trapSeries, core: trapCores, time: trapTimes, width: 1, of: () => 1 }
    : cellsOf(data.cells, meta.width);
  const fine = meta.exact ? whole : cellsOf(data.fine, data.fine[4]);
  const shown = () => (filter.process === ALL ? fine : whole);

  const number = (count) => count.toLocaleString("en-US");
  const plural = (count, what) => `${number(count)} ${what}${count === 1 ? "" : what === "process" ? "es" : "s"}`;
  const seconds = (time) => (time / 1e9).toFixed(6);
  const msrTitle = (msr) => data.msrs[msr][1] || data.msrs[msr][0] || "unnamed";
  const colourOf = (msr) => Math.min(msr, NAMED);

  function span(time) {
    for (const [unit, size] of [["s", 1e9], ["ms", 1e6], ["µs", 1e3]]) {
      if (time >= size) return `${Number((time / size).toPrecision(4))} ${unit}`;
    }
    return `${Math.round(time)} ns`;
  }

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") element.className = value;
      else if (name === "onclick") element.addEventListener("click", value);
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  // ---- what is shown: filters and the part of the time ----

  const filter = { text: "", msr: ALL, core: ALL, process: ALL, access: ALL, event: ALL, from: 0, to: meta.span };
  const bits = { msr: 1, process: 2, event: 4, core: 8, rest: 16 };
  let masks = []; // of each series: which filters it does not pass

  const matches = (msr) => {
    const text = filter.text.trim().toLowerCase().replace(/^0x/, "");
    const [address, name, what] = data.msrs[msr];
    return !text || address.includes(text) || name.toLowerCase().includes(text) || what.toLowerCase().includes(text);
  };

  function maskSeries() {
    const found = data.msrs.map((_, msr) => matches(msr));
    masks = data.series.map((series) =>
      (filter.msr !== ALL && series[MSR] !== filter.msr ? bits.msr : 0) |
      (filter.process !== ALL && series[PROCESS] !== filter.process ? bits.process : 0) |
      (filter.event !== ALL && series[EVENT] !== filter.event ? bits.event : 0) |
      (found[series[MSR]] && (filter.access === ALL || series[ACCESS] === filter.access) ? 0 : bits.rest));
  }

  const inView = (time, width) => time < filter.to && time + width > filter.from;
  const coreMask = (core) => (filter.core !== ALL && core !== filter.core ? bits.core : 0);

  // Counts by MSR, core, process and event. In each of these tables its own filter does not count, so that another row can be chosen.
  function sums() {
    const empty = () => ({ total: 0, writes: 0, reads: 0, cores: new Set() });
    const made = { total: 0, msr: new Map(), core: new Map(), process: new Map(), event: new Map() };
    const add = (map, key, count, series, core) => {
      let row = map.get(key);
      if (!row) map.set(key, (row = empty()));
      row.total += count;
      if (series[ACCESS] === READ) row.reads += count;
      else row.writes += count;
      row.cores.add(core);
    };
    const each = (points, visit) => {
      for (let i = 0; i < points.time.length; i++) {
        if (!inView(points.time[i], points.width)) continue;
        const core = points.core[i];
        visit(masks[points.series[i]] | coreMask(core), points.of(i), data.series[points.series[i]], core);
      }
    };
    each(shown(), (mask, count, series, core) => {
      if (mask === 0) made.total += count;
      if ((mask & ~bits.msr) === 0) add(made.msr, series[MSR], count, series, core);
      if ((mask & ~bits.core) === 0) add(made.core, core, count, series, core);
      if ((mask & ~bits.event) === 0) add(made.event, series[EVENT], count, series, core);
    });
    if (meta.hasProcesses) {
      each(whole, (mask, count, series, core) => {
        if ((mask & ~bits.process) === 0) add(made.process, series[PROCESS], count, series, core);
      });
    }
    return made;
  }

  // ---- tables ----

  const PAGE = 60;

  // columns: {title, of: row -> what it is sorted by, show: (row, cell) -> content, class, down: first sorted downwards}.
  function table(section, columns, { sort, down, label, empty, key }) {
    // Roles as they are anyway, which a row loses where a narrow window makes it something else than a line of cells.
    const head = make("tr", { role: "row" });
    const body = make("tbody", { role: "rowgroup" });
    const grid = make("table", { "aria-label": label, role: "table" }, make("thead", { role: "rowgroup" }, head), body);
    const scroll = make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": label }, grid);
    const none = make("p", { class: "empty" }, empty);
    const more = make("button", { type: "button", class: "more", onclick: () => { most *= 4; draw(); } });
    section.append(scroll, none, more);
    let rows = [], most = PAGE;
    const headings = columns.map((column, i) => {
      const button = make("button", { type: "button", onclick: () => {
        [sort, down] = [i, sort === i ? !down : Boolean(column.down)];
        most = PAGE;
        draw();
      } }, column.title);
      const heading = make("th", { scope: "col", role: "columnheader", class: column.class || "" }, button);
      head.append(heading);
      return heading;
    });

    function draw() {
      const { of } = columns[sort];
      const sorted = rows.map((row, i) => [of(row), i, row]).sort((a, b) =>
        (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0) * (down ? -1 : 1) || a[1] - b[1]);
      headings.forEach((heading, i) => {
        if (i === sort) heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        else heading.removeAttribute("aria-sort");
      });
      const focused = body.contains(document.activeElement) ? document.activeElement.dataset.key : null;
      body.replaceChildren(...sorted.slice(0, most).map(([, , row]) => {
        const line = make("tr", { role: "row" });
        for (const column of columns) {
          const cell = make("td", { role: "cell", class: column.class || "" });
          const content = column.show(row, cell);
          if (content !== undefined && content !== null) cell.append(...[content].flat());
          line.append(cell);
        }
        if (key && key(row)) line.className = "chosen";
        return line;
      }));
      if (focused) [...body.querySelectorAll("button")].find((button) => button.dataset.key === focused)?.focus();
      scroll.hidden = !rows.length;
      none.hidden = Boolean(rows.length);
      more.hidden = rows.length <= most;
      more.textContent = `Show more: ${number(Math.min(rows.length - most, most * 3))} of the ${number(rows.length - most)} further rows`;
    }
    return (fresh) => {
      rows = fresh;
      draw();
    };
  }

  // A button that filters by what it names, or no more.
  function chooser(name, value, text) {
    const button = make("button", { type: "button", onclick: () => set(name, filter[name] === value ? ALL : value) }, text);
    button.setAttribute("aria-pressed", String(filter[name] === value));
    button.dataset.key = `${name} ${value}`;
    return button;
  }

  const dot = (msr) => {
    const made = make("span", { class: "dot", "aria-hidden": "true" });
    made.style.background = `var(--c${colourOf(msr)})`;
    return made;
  };
  const share = (count, of, cell) => {
    cell.classList.add("share");
    cell.style.setProperty("--share", `${of ? (100 * count) / of : 0}%`);
    return number(count);
  };
  const coresText = (cores) => {
    const runs = [];
    for (const core of [...cores].sort((a, b) => a - b)) {
      const last = runs[runs.length - 1];
      if (last && last[1] === core - 1) last[1] = core;
      else runs.push([core, core]);
    }
    return runs.map(([a, b]) => (a === b ? data.cores[a] : `${data.cores[a]}-${data.cores[b]}`)).join(" ");
  };
  // "0x500 -> 0xd01 +SCE +NXE": what is behind the values are chips.
  const words = (text, known) => {
    const parts = text.split(" ");
    const made = [];
    let rest;
    if (known) {
      made.push(make("span", { class: "one" }, parts[0], make("span", { class: "arrow" }, " → "), parts[2]), " ");
      rest = parts.slice(3);
    } else {
      made.push(make("span", { class: "one" }, make("span", { class: "arrow" }, "first "), parts[1]), " ");
      rest = parts.slice(2);
    }
    for (const word of rest) {
      const kind = !known ? "" : word.startsWith("+") ? " set" : word.startsWith("-") ? " unset" : "";
      made.push(make("span", { class: `chip${kind}` }, word.replace("->", "→").replace(/^-/, "−")), " ");
    }
    return made;
  };

  let now = null; // the sums that are shown
  let changed = new Map(); // changes in view, by MSR
  const anyReads = data.series.some((series) => series[ACCESS] === READ);
  const anyWrites = data.series.some((series) => series[ACCESS] === WRITE);
  const only = (...columns) => columns.filter(Boolean);

  const showMsrs = table($("msrs"), only(
    { title: "name", class: "one", of: (row) => msrTitle(row[0]), show: ([msr], cell) => {
      cell.title = data.msrs[msr][2];
      return [dot(msr), chooser("msr", msr, msrTitle(msr))];
    } },
    { title: "MSR", class: "m rest", of: (row) => data.msrs[row[0]][0].padStart(8, "0"), show: (row) => data.msrs[row[0]][0] },
    anyWrites && { title: "writes", class: "n", down: true, of: (row) => row[1].writes, show: (row, cell) => share(row[1].writes, now.most, cell) },
    anyReads && { title: "reads", class: "n", down: true, of: (row) => row[1].reads, show: (row, cell) => share(row[1].reads, now.most, cell) },
    { title: "changes", class: "n", down: true, of: (row) => row[2], show: (row) => number(row[2]) },
    { title: "cores", class: "m rest", of: (row) => row[1].cores.size, show: (row) => coresText(row[1].cores) },
    { title: "last value of all", class: "w rest", of: (row) => data.msrs[row[0]][4], show: (row) => data.msrs[row[0]][4] },
  ), { sort: 2, down: true, label: "MSRs", empty: "No MSR was accessed here.", key: (row) => row[0] === filter.msr });

  const mostOf = (map) => [...map.values()].reduce((most, row) => Math.max(most, row.total), 1);
  const counted = (name, title, texts, others = []) => [
    { title, of: (row) => row[0], show: ([index]) => chooser(name, index, texts[index]) },
    { title: "traps", class: "n", down: true, of: (row) => row[1].total, show: (row, cell) => share(row[1].total, mostOf(now[name]), cell) },
    ...others,
  ];
  const countTable = (id, name, title, texts, others) => table($(id), counted(name, title, texts, others), {
    sort: 1, down: true, label: `${title} and traps`, empty: "None here.", key: (row) => row[0] === filter[name],
  });
  const showProcesses = meta.hasProcesses && countTable("processes", "process", "process", data.processes, [
    { title: "cores", class: "m rest", of: (row) => row[1].cores.size, show: (row) => coresText(row[1].cores) },
  ]);
  const showCores = countTable("cores", "core", "core", data.cores.map((core) => `core ${core}`));
  const showEvents = countTable("events", "event", "event", data.events.map(([event, text]) => `${event}: ${text || "not known"}`));
  if (!meta.hasProcesses) $("processes").append(make("p", { class: "empty" }, "Unknown: these records do not tell whose traps they are."));

  const processColumn = (of) => meta.hasProcesses && { title: "process", class: "one", of, show: (row) => data.processes[of(row)] };
  const showChanges = table($("changes"), only(
    { title: "seconds", class: "n m", of: (i) => changeTimes[i], show: (i) => seconds(changeTimes[i]) },
    { title: "core", class: "m", of: (i) => changeCores[i], show: (i) => data.cores[changeCores[i]] },
    { title: "MSR", of: (i) => msrTitle(changeMsrs[i]), show: (i) => [dot(changeMsrs[i]), chooser("msr", changeMsrs[i], msrTitle(changeMsrs[i]))], class: "one" },
    processColumn((i) => changeProcesses[i]),
    { title: "change", class: "w", of: (i) => data.texts[changeTexts[i]], show: (i) => words(data.texts[changeTexts[i]], changeKnown[i]) },
  ), { sort: 0, down: false, label: "Changes", empty: "No MSR changed here." });

  const OUTCOMES = ["", "short-circuited", "#GP", "short-circuited, #GP"];
  const series = (i) => data.series[trapSeries[i]];
  const hasValue = (i) => !(series(i)[ACCESS] === READ && series(i)[STAGE] === PRE);
  const showTraps = table($("traps"), only(
    { title: "seconds", class: "n m", of: (i) => trapTimes[i], show: (i) => seconds(trapTimes[i]) },
    { title: "core", class: "m", of: (i) => trapCores[i], show: (i) => data.cores[trapCores[i]] },
    { title: "access", class: "m rest", of: (i) => series(i)[ACCESS] * 4 + series(i)[STAGE], show: (i) =>
      `${series(i)[ACCESS] === READ ? "rdmsr" : "wrmsr"} ${series(i)[STAGE] === PRE ? "pre" : "post"}` },
    { title: "MSR", class: "one", of: (i) => msrTitle(series(i)[MSR]), show: (i) => [dot(series(i)[MSR]), chooser("msr", series(i)[MSR], msrTitle(series(i)[MSR]))] },
    { title: "value", class: "m", of: (i) => trapValues[i].padStart(16, "0"), show: (i) => (hasValue(i) ? trapValues[i].padStart(16, "0") : "-") },
    { title: "RIP", class: "m rest", of: (i) => data.places[trapPlaces[i]][0], show: (i, cell) => {
      const [address, name] = data.places[trapPlaces[i]];
      cell.title = address;
      return name || address;
    } },
    processColumn((i) => series(i)[PROCESS]),
    data.events.length > 1 && { title: "event", class: "m rest", of: (i) => series(i)[EVENT], show: (i) => data.events[series(i)[EVENT]][0] },
    data.series.some((one) => one[OUTCOME]) && { title: "", class: "rest", of: (i) => series(i)[OUTCOME], show: (i) => OUTCOMES[series(i)[OUTCOME]] },
  ), { sort: 0, down: false, label: "Traps", empty: "None here." });
  if (!meta.exact) {
    $("traps").querySelector("h2").after(make("p", { class: "quiet" }, `Every ${number(meta.stride)}th of all ${number(meta.total)}.`));
  }

  // ---- the timeline ----

  const canvas = $("canvas"), tip = $("tip");
  const GUTTER = 66, AXIS = 20, STRIP = 18;
  const laneHeight = data.cores.length <= 4 ? 48 : data.cores.length <= 8 ? 32 : data.cores.length <= 24 ? 22 : 14;
  let selecting = null; // [from, to] in pixels while a part of the time is being chosen
  let slots = null;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const place = (time, width) => GUTTER + ((time - filter.from) / (filter.to - filter.from)) * (width - GUTTER);
  const timeAt = (x, width) => filter.from + ((x - GUTTER) / (width - GUTTER)) * (filter.to - filter.from);

  // Counts by core, slot (some pixels wide) and colour, of what passes the filters.
  function fillSlots(width) {
    const viewed = filter.to - filter.from, points = shown();
    const wanted = Math.max(2, meta.exact ? 3 : ((width - GUTTER) * points.width) / viewed);
    const count = Math.max(1, Math.round((width - GUTTER) / wanted));
    const lanes = data.cores.map(() => new Float64Array(count * (NAMED + 1)));
    for (let i = 0; i < points.time.length; i++) {
      const time = points.time[i];
      if (!inView(time, points.width) || masks[points.series[i]] | coreMask(points.core[i])) continue;
      const middle = time + (points.width - 1) / 2;
      const slot = Math.min(count - 1, Math.max(0, Math.floor(((middle - filter.from) / viewed) * count)));
      lanes[points.core[i]][slot * (NAMED + 1) + colourOf(data.series[points.series[i]][MSR])] += points.of(i);
    }
    let most = 1;
    for (const lane of lanes) {
      for (let slot = 0; slot < count; slot++) {
        let sum = 0;
        for (let c = 0; c <= NAMED; c++) sum += lane[slot * (NAMED + 1) + c];
        if (sum > most) most = sum;
      }
    }
    return { count, lanes, most };
  }

  function drawTimeline() {
    const width = Math.max(200, canvas.clientWidth), height = data.cores.length * laneHeight + STRIP + AXIS;
    const scale = window.devicePixelRatio || 1;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const draw = canvas.getContext("2d");
    draw.scale(scale, scale);
    slots = fillSlots(width);
    const colours = Array.from({ length: NAMED + 1 }, (_, i) => colour(`--c${i}`));
    const [ink, quiet, line, faint, accent] = ["--ink", "--quiet", "--line", "--faint", "--accent"].map(colour);
    const slotWidth = (width - GUTTER) / slots.count;
    const bottom = data.cores.length * laneHeight;
    draw.font = '12px system-ui, "DejaVu Sans", sans-serif';
    draw.textBaseline = "middle";
    // The axis first: its lines lie behind everything.
    for (const time of ticks(width)) {
      const x = Math.round(place(time, width)) + 0.5;
      draw.fillStyle = faint;
      draw.fillRect(x - 0.5, 0, 1, bottom + STRIP);
      draw.fillStyle = quiet;
      const text = span(time);
      const half = draw.measureText(text).width / 2;
      draw.fillText(time === 0 ? "0" : text, Math.min(Math.max(x - half, GUTTER), width - 2 * half), bottom + STRIP + AXIS / 2 + 2);
    }
    slots.lanes.forEach((lane, core) => {
      const base = (core + 1) * laneHeight - 1;
      draw.fillStyle = filter.core === core ? accent : ink;
      if (laneHeight >= 14) draw.fillText(`core ${data.cores[core]}`, 2, base - laneHeight / 2 + 2, GUTTER - 8);
      draw.fillStyle = line;
      draw.fillRect(GUTTER, base, width - GUTTER, 1);
      for (let slot = 0; slot < slots.count; slot++) {
        const at = slot * (NAMED + 1);
        let sum = 0;
        for (let c = 0; c <= NAMED; c++) sum += lane[at + c];
        if (!sum) continue;
        // The height is logarithmic, or the busiest moment would be all that can be seen; the colours share it as they are.
        const tall = Math.max(2, (Math.log1p(sum) / Math.log1p(slots.most)) * (laneHeight - 5));
        let y = base;
        for (let c = 0; c <= NAMED; c++) {
          const part = (lane[at + c] / sum) * tall;
          if (!part) continue;
          draw.fillStyle = colours[c];
          draw.fillRect(GUTTER + slot * slotWidth, y - part, Math.max(1, slotWidth - (slotWidth > 2.5 ? 1 : 0)), part);
          y -= part;
        }
      }
    });
    draw.fillStyle = quiet;
    draw.fillText("changes", 2, bottom + STRIP / 2, GUTTER - 8);
    draw.fillStyle = accent;
    for (const i of changesInView()) {
      if (changeKnown[i]) draw.fillRect(Math.round(place(changeTimes[i], width)), bottom + 4, 1, STRIP - 8);
    }
    if (selecting) {
      draw.globalAlpha = 0.18;
      draw.fillRect(Math.min(...selecting), 0, Math.abs(selecting[1] - selecting[0]), bottom + STRIP);
      draw.globalAlpha = 1;
    }
    canvas.setAttribute("aria-label", `Traps of ${plural(data.cores.length, "core")} from ${span(filter.from)} to ${span(filter.to)}: ${number(now.total)}`);
  }

  function ticks(width) {
    const wanted = (filter.to - filter.from) / Math.max(2, (width - GUTTER) / 110);
    const power = 10 ** Math.floor(Math.log10(wanted));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= wanted);
    const made = [];
    for (let time = Math.ceil(filter.from / step) * step; time < filter.to; time += step) made.push(time);
    return made;
  }

  function zoom(from, to) {
    const least = Math.min(meta.span, meta.exact ? 1000 : meta.width);
    const length = Math.min(meta.span, Math.max(least, to - from));
    let start = Math.max(0, Math.min(meta.span - length, from + (to - from - length) / 2));
    let end = start + length;
    if (!meta.exact) { // cells are whole or not at all
      start = Math.floor(start / meta.width) * meta.width;
      end = Math.min(meta.span, Math.ceil(end / meta.width) * meta.width);
    }
    [filter.from, filter.to] = [start, end];
    update();
  }
  const closer = (factor) => {
    const middle = (filter.from + filter.to) / 2, half = ((filter.to - filter.from) * factor) / 2;
    zoom(middle - half, middle + half);
  };
  const move = (part) => {
    const by = (filter.to - filter.from) * part;
    const kept = Math.max(-filter.from, Math.min(meta.span - filter.to, by));
    zoom(filter.from + kept, filter.to + kept);
  };
  const moves = {
    "+": () => closer(0.5), "=": () => closer(0.5), "-": () => closer(2), "0": () => zoom(0, meta.span), Home: () => zoom(0, meta.span),
    ArrowLeft: () => move(-0.25), ArrowRight: () => move(0.25),
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !moves[event.key]) return;
    event.preventDefault();
    moves[event.key]();
  });
  for (const [id, key] of [["closer", "+"], ["wider", "-"], ["whole", "0"], ["earlier", "ArrowLeft"], ["later", "ArrowRight"]]) {
    $(id).addEventListener("click", moves[key]);
  }

  const pixel = (event) => Math.max(GUTTER, Math.min(canvas.clientWidth, event.offsetX));
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || event.offsetX < GUTTER) return;
    canvas.setPointerCapture(event.pointerId);
    selecting = [pixel(event), pixel(event)];
    tip.hidden = true;
  });
  canvas.addEventListener("pointermove", (event) => {
    if (selecting) {
      selecting[1] = pixel(event);
      drawTimeline();
    } else {
      explain(event);
    }
  });
  const released = (event) => {
    const chosen = selecting;
    selecting = null;
    if (!chosen) return;
    const [from, to] = chosen.map((x) => timeAt(x, canvas.clientWidth)).sort((a, b) => a - b);
    if (event.type === "pointerup" && Math.abs(chosen[1] - chosen[0]) > 4) zoom(from, to);
    else drawTimeline();
  };
  canvas.addEventListener("pointerup", released);
  canvas.addEventListener("pointercancel", released);
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("dblclick", () => zoom(0, meta.span));

  // What is under the pointer.
  function explain(event) {
    const core = Math.floor(event.offsetY / laneHeight), width = canvas.clientWidth;
    if (event.offsetX < GUTTER || core < 0 || core >= data.cores.length) {
      tip.hidden = true;
      return;
    }
    const slot = Math.min(slots.count - 1, Math.floor(((event.offsetX - GUTTER) / (width - GUTTER)) * slots.count));
    const length = (filter.to - filter.from) / slots.count, from = filter.from + slot * length;
    const found = new Map(), points = shown();
    for (let i = 0; i < points.time.length; i++) {
      const time = points.time[i] + (points.width - 1) / 2;
      if (points.core[i] !== core || time < from || time >= from + length || masks[points.series[i]] | coreMask(core)) continue;
      const msr = data.series[points.series[i]][MSR];
      found.set(msr, (found.get(msr) || 0) + points.of(i));
    }
    tip.hidden = !found.size;
    if (!found.size) return;
    const rows = [...found].sort((a, b) => b[1] - a[1]);
    tip.replaceChildren(
      make("b", {}, `core ${data.cores[core]}, ${seconds(from)} s + ${span(length)}`),
      ...rows.slice(0, 8).map(([msr, count]) => make("div", {}, dot(msr), `${msrTitle(msr)} ${number(count)}`)),
      ...(rows.length > 8 ? [`and ${plural(rows.length - 8, "more MSR")}`] : []),
    );
    const left = event.offsetX + 14 + tip.offsetWidth > width ? event.offsetX - 14 - tip.offsetWidth : event.offsetX + 14;
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${Math.min(event.offsetY + 10, Math.max(0, canvas.clientHeight - tip.offsetHeight))}px`;
  }

  // ---- all together ----

  const msrMasked = (msr) => (filter.msr !== ALL && msr !== filter.msr ? bits.msr : 0) | (matches(msr) ? 0 : bits.rest);

  function changesInView() {
    const made = [];
    if (filter.access === READ) return made;
    for (let i = 0; i < changeTimes.length; i++) {
      if (!inView(changeTimes[i], 1) || coreMask(changeCores[i]) || msrMasked(changeMsrs[i])) continue;
      if (filter.process === ALL || changeProcesses[i] === filter.process) made.push(i);
    }
    return made;
  }

  // Of each MSR in view: all of its changes where nothing is filtered (not all may be listed), else those that are listed.
  function countChanges() {
    changed = new Map();
    if (filter.from === 0 && filter.to === meta.span && filter.core === ALL && filter.process === ALL && filter.access !== READ) {
      data.msrs.forEach((msr, i) => changed.set(i, msr[3]));
      return;
    }
    for (let i = 0; i < changeTimes.length; i++) {
      if (!changeKnown[i] || !inView(changeTimes[i], 1) || coreMask(changeCores[i]) || filter.access === READ) continue;
      if (filter.process === ALL || changeProcesses[i] === filter.process) changed.set(changeMsrs[i], (changed.get(changeMsrs[i]) || 0) + 1);
    }
  }

  function update() {
    maskSeries();
    now = sums();
    now.most = Math.max(1, ...[...now.msr.values()].map((row) => Math.max(row.writes, row.reads)));
    countChanges();
    for (const [name, select] of selects) {
      select.value = String(filter[name]);
      select.parentElement.classList.toggle("on", filter[name] !== ALL);
    }
    $("find").parentElement.classList.toggle("on", Boolean(filter.text));
    const all = filter.from === 0 && filter.to === meta.span;
    const filtered = !all || filter.text || [...selects.keys()].some((name) => filter[name] !== ALL);
    $("reset").disabled = !filtered;
    $("shown").replaceChildren(make("b", {}, number(now.total)), ` of ${plural(meta.total, "trap")}`);
    $("window").textContent = all ? `${span(meta.span)}` : `${seconds(filter.from)} s to ${seconds(filter.to)} s (${span(filter.to - filter.from)})`;
    $("wider").disabled = $("whole").disabled = $("earlier").disabled = $("later").disabled = all;
    drawTimeline();
    showMsrs([...now.msr].map(([msr, row]) => [msr, row, changed.get(msr) || 0]));
    if (showProcesses) showProcesses([...now.process]);
    showCores([...now.core]);
    showEvents([...now.event]);
    showChanges(changesInView());
    const traps = [];
    for (let i = 0; i < trapTimes.length; i++) {
      if (inView(trapTimes[i], 1) && !(masks[trapSeries[i]] | coreMask(trapCores[i]))) traps.push(i);
    }
    showTraps(traps);
  }

  function set(name, value) {
    filter[name] = value;
    update();
  }

  const options = (texts, all) => [make("option", { value: String(ALL) }, all), ...texts.map(([value, text]) => make("option", { value: String(value) }, text))];
  const selects = new Map();
  const byName = data.msrs.map((msr, i) => [i, msr[1] ? `${msr[1]} (${msr[0]})` : msr[0]]).sort((a, b) => (a[1] < b[1] ? -1 : 1));
  for (const [name, texts, all] of [
    ["msr", byName, "every MSR"],
    ["core", data.cores.map((core, i) => [i, `core ${core}`]), "every core"],
    ["process", meta.hasProcesses ? data.processes.map((text, i) => [i, text]) : [], meta.hasProcesses ? "every process" : "unknown"],
    ["access", [[WRITE, "writes"], [READ, "reads"]], "reads and writes"],
    ["event", data.events.map(([event, text], i) => [i, `${event}: ${text}`]), "every event"],
  ]) {
    const select = $(`by-${name}`);
    select.append(...options(texts, all));
    select.disabled = texts.length < 2;
    select.addEventListener("change", () => set(name, Number(select.value)));
    selects.set(name, select);
  }
  $("find").addEventListener("input", () => set("text", $("find").value));
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("reset").addEventListener("click", () => {
    Object.assign(filter, { text: "", msr: ALL, core: ALL, process: ALL, access: ALL, event: ALL, from: 0, to: meta.span });
    $("find").value = "";
    update();
  });

  $("file").textContent = meta.file;
  $("about").textContent = [meta.machine, meta.recorded && `recorded ${meta.recorded}`, meta.ended].filter(Boolean).join(" · ");
  $("made").textContent = `vmexit ${meta.version}. Times are seconds since the recording began.`;
  const figures = [
    ["traps", number(meta.total)], ["long", meta.spanText], ["cores", number(data.cores.length)], ["MSRs", number(data.msrs.length)],
    ["changes", number(meta.changes)], ["lost", number(meta.lost), meta.lost > 0],
  ];
  if (meta.hasProcesses) figures.splice(4, 0, ["processes", number(meta.processes)]);
  $("figures").append(...figures.map(([what, value, bad]) => make("div", { class: bad ? "bad" : "" }, make("dt", {}, what), make("dd", {}, value))));
  $("notes").append(...meta.notes.map((note) => make("li", {}, note)));
  $("legend").append(...data.msrs.slice(0, NAMED).map((_, msr) => {
    const button = make("button", { type: "button", onclick: () => set("msr", filter.msr === msr ? ALL : msr) }, dot(msr), msrTitle(msr));
    return button;
  }), ...(data.msrs.length > NAMED ? [make("span", { class: "others" }, dot(NAMED), "others")] : []));

  update();
  new ResizeObserver(() => requestAnimationFrame(drawTimeline)).observe($("lanes"));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawTimeline);
})();
