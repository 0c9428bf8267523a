// Light or dark: as the device is, until somebody says otherwise.
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const theme = { asked: null };
const themed = [];

function nowDark() { return theme.asked === null ? dark.matches : theme.asked === "dark"; }

function applyTheme() {
  document.documentElement.dataset.theme = nowDark() ? "dark" : "light";
  for (const redraw of themed) redraw();
}

function color(name) { return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim(); }

function themeButton() {
  const made = el("button", { id: "theme", type: "button", on: { click: () => {
    theme.asked = nowDark() ? "light" : "dark";
    applyTheme();
  } } });
  const name = () => { made.textContent = nowDark() ? "Light" : "Dark"; };
  themed.push(name);
  name();
  return made;
}

document.documentElement.dataset.theme = nowDark() ? "dark" : "light";
dark.addEventListener("change", () => theme.asked === null && applyTheme());
