// The predictions of a lesson are answered in the page.
import { ask } from "./predict.js";

for (const answer of document.querySelectorAll("details")) ask(answer);
