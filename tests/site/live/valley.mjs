// What the laboratory's chart shows at positions of its controls, as JSON: node valley.mjs LIVE < { data, positions }
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const { state } = await import(pathToFileURL(join(process.argv[2], "valley.js")).href);
const { data, positions } = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(positions.map((position) => state(data, position))));
