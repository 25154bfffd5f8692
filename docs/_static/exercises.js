// Functions that are written in the page: an expression, or a few lines of NumPy, which numpy.js reads. `judgeWritten`
// finds out what is wrong as minilora/exercises/grading.py does, by the same lines.
"use strict";

const judgeWritten = (() => {
  const { entries, fromLists, generator, isArray, said, stacked, view } = numpyArrays;
  const shapeOf = ({ shape }) => said(shape);
  const size = ({ shape }) => shape.reduce((all, one) => all * one, 1);
  const near = (v, w, tolerance = 1e-9) => Math.abs(v - w) <= 1e-12 + tolerance * Math.abs(w);
  const times = (a, number) =>
    view(
      a.shape,
      entries(a).map((v) => number * v),
    );
  const norm = (a, b) => Math.hypot(...entries(a).map((v, i) => v - entries(b)[i]));
  class Unusable extends Error {}

  function alike(a, b, tolerance) {
    if (!a || !b || shapeOf(a) !== shapeOf(b)) return false;
    const other = entries(b);
    return entries(a).every((v, i) => near(v, other[i], tolerance));
  }

  // By which number a form must be multiplied to give a value, or null.
  function multiple(value, form, tolerance) {
    if (!value || !form || shapeOf(value) !== shapeOf(form)) return null;
    if (alike(value, form, tolerance)) return 1;
    if (size(form) === 1) return null; // any number is a multiple of another
    const dot = (a, b) => entries(a).reduce((sum, v, i) => sum + v * entries(b)[i], 0);
    const ratio = dot(form, value) / dot(form, form);
    return ratio && alike(value, times(form, ratio)) ? ratio : null;
  }

  function kindOf(value) {
    if (isArray(value)) return value.shape.length ? `an array of shape ${said(value.shape)}` : "a number";
    return value?.items ? `${value.items.length} values` : value?.text !== undefined ? "a str" : "a function";
  }

  const dataOf = (sheet, at) =>
    Object.fromEntries(Object.entries(sheet.data[at]).map(([name, v]) => [name, fromLists(v)]));
  const compute = (line, names) => {
    try {
      return runNumpy(line, names);
    } catch {
      return null;
    }
  };
  const wanted = (words, data) =>
    words[0] === "("
      ? words
          .slice(1, -1)
          .split(", ")
          .map((word) => entries(data[word])[0])
      : [];

  // What an answer gives by its names, and what is wrong with the shapes.
  function called(sheet, text, at) {
    const data = dataOf(sheet, at),
      names = Object.keys(sheet.returns);
    const known = [...sheet.arguments, ...sheet.also],
      own = dataOf(sheet, at);
    own.rng = generator(at + 1);
    let got;
    try {
      got = runNumpy(text, Object.fromEntries(known.map((name) => [name, own[name]])), sheet.arguments, names);
    } catch (error) {
      return [null, error instanceof RangeError ? "this is nested too deeply for a page" : `${error.message}.`];
    }
    for (const name of known) {
      if (data[name] && !alike(own[name], data[name], 0))
        throw new Unusable(`your code changed its argument ${name} in place; make a new array`);
    }
    if (got === null) throw new Unusable("your function returned None; is the return missing?");
    if (names.length === 1) got = { items: [got] };
    else if (got.items?.length !== names.length) {
      if (!sheet.may_lack || got.items?.length !== names.length - 1) {
        throw new Unusable(`return ${names.length} arrays, (${names.join(", ")}); you returned ${kindOf(got)}`);
      }
      got = { items: [runNumpy(sheet.forms[names[0]][0][0], data), ...got.items] };
    }
    const values = Object.fromEntries(
      names.map((name, i) => {
        try {
          return [name, stacked(got.items[i])];
        } catch {
          throw new Unusable(`${name} must be numbers, you returned ${kindOf(got.items[i])}`);
        }
      }),
    );
    const shapes = names.map((name) => said(wanted(sheet.returns[name], data)));
    const seen = names.map((name) => shapeOf(values[name]));
    const wrong = names.find((_, i) => seen[i] !== shapes[i]);
    if (wrong === undefined) return [values, ""];
    const orders = (left) =>
      left.length ? left.flatMap((i) => orders(left.filter((j) => j !== i)).map((rest) => [i, ...rest])) : [[]];
    const order = orders(names.map((_, i) => i)).find((places) =>
      places.every((place, i) => shapes[place] === seen[i]),
    );
    if (order) {
      const theirs = order.map((place) => names[place]).join(", ");
      throw new Unusable(`swapped? expected (${names.join(", ")}), you returned the shapes of (${theirs})`);
    }
    const must =
      sheet.returns[wrong] + (sheet.returns[wrong][0] === "(" ? `, here ${shapes[names.indexOf(wrong)]}` : "");
    return [values, `wrong shape: ${wrong} must be ${must}; you returned ${kindOf(got.items[names.indexOf(wrong)])}`];
  }

  function knownFactors(ratio, scales, data) {
    if (ratio === 1) return "";
    const factors = scales.map(([line, hint]) => [entries(runNumpy(line, data))[0], hint]);
    const choose = (count, left) => {
      // all ways to take so many of those that are left
      if (!count) return [[]];
      return left.flatMap((factor, i) => choose(count - 1, left.slice(i + 1)).map((rest) => [factor, ...rest]));
    };
    for (const count of [1, 2, 3]) {
      for (const chosen of choose(count, factors)) {
        if (
          near(
            ratio,
            chosen.reduce((all, [factor]) => all * factor, 1),
          )
        )
          return chosen.map(([, hint]) => hint).join("; and ");
      }
    }
    return `a wrong factor: yours is ${Number(ratio.toPrecision(7))} times the right result`;
  }

  function explained(sheet, name, value, data) {
    let { scales } = sheet,
      forms = sheet.forms[name];
    if (alike(data.out, data.N, 0)) {
      // a division by one size could be by any
      scales = scales.filter(([, , division]) => !division);
      if (value && !value.shape.length) forms = [];
    }
    for (const [line, hint] of forms) {
      const ratio = multiple(value, compute(line, data), sheet.tolerance);
      if (ratio !== null) return [hint, knownFactors(ratio, scales, data)].filter(Boolean).join("; and ");
    }
    return "";
  }

  function judge(sheet, text) {
    const places = sheet.data.map((_, at) => at);
    const replies = places.map((at) => called(sheet, text, at));
    const tries = places
      .filter((at) => replies[at][0])
      .map((at) => {
        const data = dataOf(sheet, at),
          names = { ...data, ...replies[at][0] };
        return [
          Object.fromEntries(
            Object.keys(sheet.forms).map((name) => [name, compute(sheet.judged[name] ?? name, names)]),
          ),
          data,
        ];
      });
    const right = (name) =>
      tries.length > 0 && alike(tries[0][0][name], compute(sheet.forms[name][0][0], tries[0][1]), sheet.tolerance);
    const [values, problem] = replies[0],
      wrong = Object.keys(sheet.forms).filter((name) => !right(name));
    if (!problem && !wrong.length) return { right: true, says: sheet.praise };
    const lines = [],
      unknown = [];
    for (const name of wrong) {
      const hint = tries.map(([found, data]) => explained(sheet, name, found[name], data)).find(Boolean);
      if (hint) lines.push(`${name}: ${hint}`);
      else if (sheet.unknown[name] && !problem && tries[0][0][name]) {
        const [found, data] = tries[0],
          far = (a) => String(Number(norm(a, runNumpy(sheet.aim, data)).toPrecision(3)));
        let says = sheet.unknown[name];
        if (sheet.aim)
          says = says
            .replace("{off}", far(found[name]))
            .replace("{least}", far(compute(sheet.forms[name][0][0], data)));
        lines.push(`${name}: ${says}`);
      } else unknown.push(name);
    }
    if (problem && (values || !lines.length)) lines.push(lines.length ? `(${problem})` : problem);
    else if (unknown.length && !problem)
      lines.push(`${unknown.join(" and ")}: the shape is right, but the values are wrong; write out one entry`);
    return { right: false, says: `Not yet. ${lines.join("\n")}` };
  }

  return (sheet, text) => {
    try {
      return judge(sheet, text.replace(/^(from minilora import exercises|exercises\.check_\w+\(.*\))$/gm, ""));
    } catch (error) {
      if (error instanceof Unusable) return { right: false, says: `Not yet. ${error.message}` };
      throw error;
    }
  };
})();

// Which factors move, from each of four starts: what is said to each answer stands in the sheet.
function judgeStarts({ starts, praise }, answers) {
  const wrong = starts.map((says, i) => says[answers[i]]).find(Boolean);
  return wrong ? { right: false, says: `Not yet. ${wrong}` } : { right: true, says: praise };
}

function startWritten(form) {
  const sheet = JSON.parse(form.querySelector("script[type='application/json']").textContent);
  const area = form.querySelector("textarea");
  const fit = () => {
    area.style.height = "auto";
    if (area.scrollHeight > area.clientHeight) area.style.height = `${area.scrollHeight + 2}px`;
  };
  area.addEventListener("input", fit);
  area.addEventListener("keydown", (event) => {
    // Enter checks one line, and begins another where there are several
    if (event.key !== "Enter" || event.isComposing) return;
    const several = area.dataset.rows > 1 || area.value.includes("\n") || /:\s*$/.test(area.value);
    if (event.ctrlKey || event.metaKey || (!several && !event.shiftKey)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  startAnswer(form, {
    read: () => area.value,
    write: (text) => {
      area.value = text;
      fit();
    },
    judge: (text) => {
      if (!text.trim()) return ["unread", "Write an expression, or a few lines."];
      const { right, says } = judgeWritten(sheet, text);
      return [right ? "right" : "wrong", says];
    },
  });
}

function startStarts(form) {
  const sheet = JSON.parse(form.querySelector("script[type='application/json']").textContent);
  const boxes = [...form.querySelectorAll("input[type=checkbox]")]; // A and B of each start
  startAnswer(form, {
    read: () => boxes.map(({ checked }) => Number(checked)).join(""),
    write: (text) =>
      boxes.forEach((box, i) => {
        box.checked = text[i] === "1";
      }),
    judge: (text) => {
      const answers = text.match(/../g).map((pair) => (pair[0] === "1" ? "A" : "") + (pair[1] === "1" ? "B" : ""));
      const { right, says } = judgeStarts(sheet, answers);
      return [right ? "right" : "wrong", says];
    },
  });
}

if (typeof document !== "undefined") {
  document.querySelectorAll("form.written:not(.starts)").forEach(startWritten);
  document.querySelectorAll("form.starts").forEach(startStarts);
}
