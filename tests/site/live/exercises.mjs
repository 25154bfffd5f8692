// What the page says to written answers, as JSON: node exercises.mjs NUMPY EXERCISES < { sheets, cases }
import { readFileSync } from "node:fs";
import { runInThisContext } from "node:vm";

for (const file of process.argv.slice(2)) runInThisContext(readFileSync(file, "utf8"));
const { sheets, cases } = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(cases.map(([name, answer]) => {
  const { right, says } = (typeof answer === "string" ? judgeWritten : judgeStarts)(sheets[name], answer);
  return [right, says];
})));
