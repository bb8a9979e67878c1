// A figure of plotly in a notebook. plotly's own code, 5 MB, comes once for all figures of a page, not once for each:
// anywidget gives up on a widget whose code is not there after two seconds, and on a slow machine it is not.
// Here a widget is ready at once; what the kernel sends before plotly's code is there is kept and then applied in order.

const MESSAGES = ["addTraces", "deleteTraces", "moveTraces", "restyle", "relayout", "update", "animate", "removeLayoutProps", "removeTraceProps"];
const LOADED = Symbol.for("micelab.plotly");

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
  const heard = []; // [event, what plotly does upon it], of the model and of each view
  let now = {}; // the message that is being applied
  let quiet = 0; // messages whose effect plotly still tells of
  let figure = null; // plotly's side, once loaded

  // What plotly tells of a kernel's change to the layout carries no mark (see drawing.py) and is not sent back.
  function hush() {
    quiet += 1;
    setTimeout(() => (quiet -= 1)); // after the promises of relayout
  }

  function apply(name, message) {
    if (name === "_py2js_relayout") hush();
    now = { [name]: message };
    for (const [event, act] of [...heard]) if (event === `change:${name}`) act();
    now = {};
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
        get: (name) => (name in now ? now[name] : model.get(name)),
        set: (name, value) => quiet && name === "_js2py_relayout" ? undefined : model.set(name, value),
        save_changes: () => model.save_changes(),
        on: (event, act) => heard.push([event, act]),
      };
      const first = !figure;
      if (first) {
        figure = make();
        figure.initialize({ model: seen });
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
