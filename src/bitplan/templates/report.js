"use strict";
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const choice = document.getElementById("format");
  const small = window.matchMedia("(max-width: 640px)");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const mouse = window.matchMedia("(pointer: fine)").matches;
  const paint = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  function themed(figure) {
    const wide = figure.layout;
    const layout = small.matches && wide.meta?.narrow ? { ...wide, ...wide.meta.narrow } : wide;
    const plane = figure.data[0]?.type === "scatter";
    const axis = { gridcolor: paint("--grid"), linecolor: paint("--rule"), fixedrange: !mouse };
    const size = small.matches ? 11 : 13;
    const made = {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size,
              color: paint("--soft") },
      hoverlabel: { bgcolor: paint("--panel"), bordercolor: paint("--soft"), align: "left",
                    font: { color: paint("--ink"), size: 13 } },
      xaxis: { ...layout.xaxis, ...axis, title: { ...layout.xaxis.title, font: { size } } },
      yaxis: { ...layout.yaxis, ...axis, title: { ...layout.yaxis.title, font: { size } } },
      dragmode: plane && mouse ? "zoom" : false,
    };
    if (root.classList.contains("printing")) made.width = 680;
    if (small.matches && plane) made.margin = { ...layout.margin, l: 58, r: 8 };
    if (small.matches && figure.data[0]?.type === "heatmap") made.xaxis.nticks = 8;
    return made;
  }

  function traces(figure) {
    return structuredClone(figure.data).map((trace) => {
      if (small.matches && trace.meta?.narrow) Object.assign(trace, trace.meta.narrow);
      if (trace.type === "scatter") trace.textfont = { color: paint("--ink") };
      if (trace.type === "heatmap" && small.matches && !trace.meta?.narrow) trace.texttemplate = "";
      if (trace.colorbar && choice) trace.visible = trace.name === choice.value;
      return trace;
    });
  }

  function draw(how = Plotly.react) {
    for (const node of document.querySelectorAll("[data-chart]")) {
      const name = node.dataset.chart;
      how(node, traces(figures[name]), themed(figures[name]),
          { displayModeBar: false, responsive: true });
    }
  }

  function print(begin) {
    root.classList.toggle("printing", begin);
    if (begin) document.querySelectorAll("details").forEach((node) => { node.open = true; });
    draw();
  }

  const filter = document.getElementById("filter");
  filter?.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    let left = 0;
    for (const row of filter.closest("section").querySelectorAll("tbody tr")) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      left += row.hidden ? 0 : 1;
    }
    document.getElementById("left").textContent = `${left} shown`;
  });
  for (const button of document.querySelectorAll("button.copy")) {
    const text = document.getElementById(button.getAttribute("aria-controls"));
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "Copied";
      } catch {  // not allowed on this page: select it, so that one key copies it
        window.getSelection().selectAllChildren(text);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
  }
  choice?.addEventListener("change", () => draw());
  // A new width has other labels, and react does not bring back those that it took away.
  small.addEventListener("change", () => draw(Plotly.newPlot));
  dark.addEventListener("change", () => draw());
  window.addEventListener("beforeprint", () => print(true));
  window.addEventListener("afterprint", () => print(false));
  if (window.Plotly) draw();
})();
