// A figure of plotly in a notebook. plotly's own code, 5 MB, comes once for all figures of a page, not once for each:
// anywidget gives up on a widget whose code is not there after two seconds, and on a slow machine it is not.
// Here a widget is ready at once; what the kernel sends before plotly's code is there is kept and then applied in order.

const MESSAGES = ["addTraces", "deleteTraces", "moveTraces", "restyle", "relayout", "update", "animate", "removeLayoutProps", "removeTraceProps"];
const LOADED = Symbol.for("micelab.plotly");
// After such a change a view of plotly goes through the whole figure for what the kernel cannot know yet and sends it back:
// a fifth of the time of a move, and no panel reads it. This report begins by asking for the figure as the kernel knows it.
const REPORTED = { _py2js_update: "style_traces", _py2js_restyle: "restyle_traces" };
const REPORT = Symbol("the report to the kernel begins");

function plotly(model) {
  window[LOADED] ??= (async () => {
    const code = await model.widget_manager.get_model(model.get("_library").slice("IPY_MODEL_".length));
    const url = URL.createObjectURL(new Blob([code.get("code")], { type: "text/javascript" }));
    try {
      return (await import(url)).default;
    } finally {
      URL.revokeObjectURL(url);
    }
  })();
  return window[LOADED];
}

export default () => {
  const waiting = []; // messages that came before plotly's code
  const heard = []; // [event, what plotly does upon it, whether that is a view], of the model and of each view
  let now = {}; // the message that is being applied
  let drawn = false; // whether a view applies it, and has nothing left to do but its report
  let figure = null; // plotly's side, once loaded

  function apply(name, message) {
    now = { [name]: message };
    for (const [event, act, view] of [...heard]) {
      if (event !== `change:${name}`) continue;
      drawn = view && Boolean(message[REPORTED[name]]);
      try {
        act();
      } catch (error) {
        if (error !== REPORT) throw error;
      }
    }
    [now, drawn] = [{}, false];
  }

  return {
    initialize({ model }) {
      for (const name of MESSAGES.map((kind) => `_py2js_${kind}`)) {
        model.on(`change:${name}`, () => {
          const message = model.get(name);
          if (message === null) return;
          if (figure) apply(name, message);
          else waiting.push([name, message]);
        });
      }
    },

    async render({ model, el }) {
      const make = await plotly(model);
      const seen = {
        get(name) {
          if (drawn && name === "_widget_data") throw REPORT;
          return name in now ? now[name] : model.get(name);
        },
        set: (name, value) => model.set(name, value),
        save_changes: () => model.save_changes(),
        on: (event, act) => heard.push([event, act, Boolean(figure)]),
      };
      const first = !figure;
      if (first) {
        const plot = make();
        plot.initialize({ model: seen });
        figure = plot;
      }
      const before = new Set(heard);
      const remove = figure.render({ model: seen, el });
      const own = heard.filter((entry) => !before.has(entry));
      if (first) for (const [name, message] of waiting.splice(0)) apply(name, message);
      return () => {
        for (const entry of own) heard.splice(heard.indexOf(entry), 1);
        remove();
      };
    },
  };
};
