"use strict"
const $ = id => document.getElementById(id)

$("_theme").onclick = () => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches
  const now = root.dataset.theme || (dark ? "dark" : "light")
  root.dataset.theme = now === "dark" ? "light" : "dark"
  localStorage.setItem("theme", root.dataset.theme)
}
$("_menu").onclick = () => $("_menu").setAttribute("aria-expanded", $("_pages").classList.toggle("open"))
const here = document.querySelector("#_pages [aria-current]")
if (here) $("_pages").scrollTop = here.offsetTop - $("_pages").clientHeight / 3

for (const block of document.querySelectorAll(".highlight")) {
  const button = Object.assign(document.createElement("button"), { className: "copy", textContent: "copy" })
  button.onclick = async () => {
    await navigator.clipboard.writeText(block.querySelector("pre").innerText)
    button.textContent = "copied"
    setTimeout(() => button.textContent = "copy", 1200)
  }
  block.append(button)
}

// A name that was linked to may lie in a folded cell.
const unfold = () => { const at = location.hash && $(decodeURIComponent(location.hash.slice(1))); for (let e = at; e; e = e.parentElement) if (e.tagName === "DETAILS") e.open = true }
addEventListener("hashchange", unfold)
unfold()

const entries = document.querySelectorAll("aside a"), seen = new Map([...entries].map(a => [decodeURIComponent(a.hash.slice(1)), a]))
if (entries.length) {
  const follow = new IntersectionObserver(found => {
    for (const one of found) if (one.isIntersecting) { entries.forEach(a => a.classList.remove("on")); seen.get(one.target.id).classList.add("on") }
  }, { rootMargin: "-10% 0px -75% 0px" })
  for (const id of seen.keys()) if ($(id)) follow.observe($(id))
}

// The index is a script and no JSON file, so that search also works on pages opened from a disk. It is fetched when the first letter is typed.
let loading
const load = () => loading ||= new Promise(done => document.head.append(Object.assign(document.createElement("script"), { src: TOP + "search.js", onload: done })))
const score = (entry, words) => {
  const title = entry[0].toLowerCase(), rest = (entry[2] + " " + entry[3]).toLowerCase()
  let sum = 0
  for (const word of words) {
    if (title === word) sum += 12
    else if (title.startsWith(word)) sum += 8
    else if (title.includes(word)) sum += 5
    else if (rest.includes(word)) sum += 1
    else return 0
  }
  return sum - title.length / 200
}
const query = $("_query"), found = $("_found")
query.oninput = async () => {
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean)
  found.hidden = !words.length
  if (!words.length) return
  await load()
  const best = INDEX.map(entry => [score(entry, words), entry]).filter(([s]) => s > 0).sort((a, b) => b[0] - a[0]).slice(0, 12)
  found.replaceChildren(...best.map(([, [title, url, where, text]]) => {
    const item = document.createElement("li"), link = Object.assign(document.createElement("a"), { href: TOP + url }), small = document.createElement("small")
    small.textContent = [where, text].filter(Boolean).join(" · ")
    link.append(title, small)
    item.append(link)
    return item
  }))
  if (!best.length) found.innerHTML = "<li><small>Nothing found</small></li>"
  else found.querySelector("a").classList.add("on")
}
query.onkeydown = event => {
  const links = [...found.querySelectorAll("a")], at = links.findIndex(a => a.classList.contains("on"))
  if (event.key === "Escape") { query.value = ""; found.hidden = true; query.blur() }
  if (!links.length) return
  if (event.key === "Enter") links[Math.max(at, 0)].click()
  const move = { ArrowDown: 1, ArrowUp: -1 }[event.key]
  if (move) {
    event.preventDefault()
    links[at]?.classList.remove("on")
    const next = links[(at + move + links.length) % links.length]
    next.classList.add("on")
    next.scrollIntoView({ block: "nearest" })
  }
}
addEventListener("keydown", event => { if (event.key === "/" && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) { event.preventDefault(); query.focus() } })
addEventListener("click", event => { if (!event.target.closest(".find")) found.hidden = true; if (event.target.closest("#_found a")) found.hidden = true })
