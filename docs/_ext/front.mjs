// The stills of the front page's object, as JSON: node front.mjs < { name: [scene, time, settings] }
import { readFileSync } from "node:fs";

const { picture, markup } = await import("../_static/live/board.js");
const { begun, stateOf } = await import("../_static/live/scenes.js");

// The scene opened, at a time, with what a reader may have set.
function still([scene, time, settings = null]) {
  const first = begun({ still: true }), times = { ...first.times, [scene]: time };
  const tale = { ...first, scene, times, open: [scene], settings: { ...first.settings, ...settings } };
  const { alt, width, height, ...shown } = picture(stateOf(tale));
  return { alt, width, height, inside: markup(shown) };
}

const asked = Object.entries(JSON.parse(readFileSync(0, "utf8")));
console.log(JSON.stringify(Object.fromEntries(asked.map(([name, given]) => [name, still(given)]))));
