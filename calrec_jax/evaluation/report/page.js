// Search, filters and paging of the examples. The page is whole without it. No text becomes HTML here.
'use strict';
document.documentElement.classList.add('js');
document.addEventListener('DOMContentLoaded', () => {
  const data = document.getElementById('examples-data');
  if (!data) return;
  const people = JSON.parse(data.textContent);
  const get = (name) => document.getElementById(name);
  const articles = people.map((_, number) => get('example-' + number));
  const words = people.map((one) => [one.user, one.truth, ...one.history, ...one.texts.flatMap((each) => each[1].map((t) => t[1])),
    ...one.methods.flatMap((each) => each.top.map((t) => t[0]))].join('\n').toLowerCase());
  let page = 0;
  const fits = (number) => {
    const one = people[number];
    const hit = get('hit').value;
    const target = get('target').value;
    if (!get('search').value.toLowerCase().split(/\s+/).every((word) => words[number].includes(word))) return false;
    if (hit && one.methods[Number(hit.slice(1))].hit !== (hit[0] === 'y')) return false;
    return !target || { cold: one.cold, warm: one.cold === false, repeat: one.repeat, 'new': one.repeat === false }[target];
  };
  const show = () => {
    const size = Number(get('size').value);
    const found = people.map((_, number) => number).filter(fits);
    page = Math.max(0, Math.min(page, Math.ceil(found.length / size) - 1));
    const on = new Set(found.slice(page * size, (page + 1) * size));
    articles.forEach((article, number) => article.classList.toggle('on', on.has(number)));
    // Not `disabled`, which would take the focus away from whom pages by keyboard.
    get('before').setAttribute('aria-disabled', page === 0);
    get('after').setAttribute('aria-disabled', (page + 1) * size >= found.length);
    get('status').textContent = found.length
      ? `${page * size + 1} to ${page * size + on.size} of the ${found.length} users that fit (of ${people.length})`
      : 'No user fits; clear the search or a filter.';
  };
  const again = () => { page = 0; show(); };
  for (const name of ['search', 'hit', 'target', 'size']) get(name).addEventListener('input', again);
  const turn = (by) => { page += by; show(); get('status').scrollIntoView({ block: 'nearest' }); };
  get('before').addEventListener('click', () => turn(-1));
  get('after').addEventListener('click', () => turn(1));
  show();
});
