// What each part of one script gives, and what its module gives: node bundle.mjs LIVE ONE < { names of the parts }
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [live, one] = process.argv.slice(2), from = (path) => import(pathToFileURL(path).href);
const parts = (await from(one)).default, found = {};
for (const name of JSON.parse(readFileSync(0, "utf8")).names) {
  found[name] = [parts[name], await from(join(live, `${name}.js`))].map((given) => Object.keys(given).sort());
}
console.log(JSON.stringify(found));
