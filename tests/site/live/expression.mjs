// What docs/_static/expression.js says to expressions, as JSON: node expression.mjs FILE < { cases: [[sheet, text]] }
import { readFileSync } from "node:fs";
import { runInThisContext } from "node:vm";

runInThisContext(readFileSync(process.argv[2], "utf8"));  // a plain script, as in the page: its functions are global
const { cases } = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(cases.map(([sheet, text]) => {
  const { right, says } = judgeExpression(sheet, text);
  return [right, says];
})));
