// Two parts of the pages that train in the browser, without a page: node parts.mjs LIVE < what is asked, in JSON
//
// { ids }                      what `generate` says, where the model's next tokens are these
// { heat }                     the classes of the cells of a heat map with one row of these numbers
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [live] = process.argv.slice(2);
const from = (name) => import(pathToFileURL(join(live, name)).href);
const asked = JSON.parse(readFileSync(0, "utf8"));

async function said(ids) {
  const { Matrix } = await from("matrix.js");
  const { generate } = await from("tuning.js");
  let step = 0;
  const forward = (given) => {
    const logits = Matrix.zeros(given.length, 8);
    logits.data[logits.data.length - 8 + ids[step]] = 1e9;
    step += 1;
    return [logits, {}];
  };
  return [...generate({ forward }, [4], ids.length, { temperature: 1, random: () => 0.5 })];
}

async function classes(data) {
  const cells = [];
  globalThis.document = {
    createElementNS: () => ({ attributes: {}, setAttribute(name, value) { this.attributes[name] = value; } }),
  };
  const { heat } = await from("draw.js");
  heat({ append: (cell) => cells.push(cell.attributes.class) }, { rows: 1, columns: data.length, data });
  return cells;
}

console.log(JSON.stringify(asked.ids ? await said(asked.ids) : await classes(asked.heat)));
