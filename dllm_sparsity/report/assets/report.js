// Unpack the data of this page and draw each chart when it is scrolled to. Foreign text is only ever set as text.
"use strict";
(() => {
  const pointed = () => matchMedia("(hover: hover)").matches;

  const unpack = async (id) => {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };

  let loading = null;
  const plotly = () => {
    loading ??= unpack("plotly-packed").then((code) => {
      const script = document.createElement("script");
      script.textContent = code;
      document.head.append(script);
      return window.Plotly;
    });
    return loading;
  };

  const theme = () => {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: of("--grid"), linecolor: of("--line"), tickcolor: of("--line"), zerolinecolor: of("--grid") };
    return { layout: {
      font: { color: of("--ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis,
      hoverlabel: { bgcolor: of("--raised"), bordercolor: of("--line"), font: { color: of("--ink") }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: of("--soft"), activecolor: of("--ink") },
    } };
  };

  const draw = async (plot) => {
    const Plotly = await plotly();
    if (!plot.isConnected) return;
    const layout = { ...plot.figure.layout, template: theme(), autosize: true };
    const config = { responsive: true, displaylogo: false, displayModeBar: pointed() ? "hover" : false,
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
    await Plotly.react(plot, plot.figure.data, layout, config);
    plot.dataset.drawn = "yes";
  };

  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watcher.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "300px" });

  const make = (name, text, className) => {
    const node = document.createElement(name);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };

  const tableOf = ({ columns, rows, text }) => {
    const table = make("table"), head = table.createTHead().insertRow(), body = table.createTBody();
    columns.forEach((name, at) => head.append(make("th", name, at < text ? "" : "figure")));
    for (const row of rows) {
      const line = body.insertRow();
      row.forEach((value, at) => line.append(make("td", value, at < text ? "" : "figure")));
    }
    const scroll = make("div", undefined, "scroll");
    scroll.tabIndex = 0;
    scroll.append(table);
    return scroll;
  };

  const download = (name, { columns, rows }) => {
    // a spreadsheet would run foreign text that starts like a formula
    const quote = (value) => `"${String(value).replace(/^[=@+]/, "'$&").replaceAll('"', '""')}"`;
    const text = [columns, ...rows].map((row) => row.map(quote).join(",")).join("\n");
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = `${name}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  const show = (panel, charts, open) => {
    panel.querySelectorAll(".plot").forEach((plot) => watcher.unobserve(plot));
    panel.querySelector(".charts").replaceChildren(...charts.map((chart, at) => {
      const figure = make("figure"), plot = make("div", undefined, "plot"), details = make("details");
      plot.style.height = `${chart.height}px`;
      plot.figure = chart.figure;
      plot.setAttribute("role", "img");
      plot.setAttribute("aria-label", `${chart.title}. ${chart.caption}`);
      const csv = make("button", "Download as CSV", "csv");
      csv.type = "button";
      csv.addEventListener("click", () => download(`${panel.id}-${at + 1}`, chart.table));
      details.open = open[at] ?? false;
      details.append(make("summary", "Numbers"), tableOf(chart.table), csv);
      figure.append(make("h3", chart.title), plot, make("figcaption", chart.caption), details);
      return figure;
    }));
    panel.querySelectorAll(".plot").forEach((plot) => watcher.observe(plot));
  };

  const start = async (panel) => {
    const options = JSON.parse(await unpack(`${panel.id}-packed`));
    const select = panel.querySelector("select");
    const open = () => [...panel.querySelectorAll("details")].map((details) => details.open);
    select?.addEventListener("change", () => show(panel, options[Number(select.value)], open()));
    show(panel, options[Number(select?.value ?? panel.dataset.first)], open());
  };

  const redraw = () => document.querySelectorAll(".plot[data-drawn]").forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  matchMedia("print").addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => document.querySelectorAll(".plot").forEach((plot) => plot.figure && draw(plot)));
  document.querySelectorAll(".panel").forEach(start);
})();
