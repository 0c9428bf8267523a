// The page begins; where its server is there, it asks for what is new while somebody looks.
const EVERY = 2000;

function begin() {
  page.live = JSON.parse(document.getElementById("live").textContent);
  frontSection();
  trialSection();
  metricSection();
  trajectorySection();
  descentSection();
  coordinatesSection();
  importanceSection();
  stepSections();
  divergedSection();
  diagnosisSection();
  timeSection();
  settingsSection();
  document.getElementById("top").after(bar);
  Object.assign(bar.style, { position: "sticky", top: "44px", zIndex: 19, maxWidth: "1120px", margin: "8px auto", background: color("card") });
  document.getElementById("nav").after(bar);
  themed.push(() => { bar.style.background = color("card"); redraw(); });
  window.addEventListener("beforeprint", () => page.sections.forEach((place) => place.there() && !place.shown && place.draw()));
  const given = document.getElementById("data");
  take(JSON.parse(given.textContent));
  given.remove();
  refresh();
  if (page.live) setTimeout(follow, EVERY);
  document.documentElement.dataset.ready = "yes";
}

async function follow() {
  if (!document.hidden) {
    try {
      const known = page.data.kind === "sweep" ? page.rows.count : page.data.done;
      const answer = await fetch(`/data?after=${known}&epoch=${page.data.epoch}`, { cache: "no-store" });
      const data = await answer.json();
      if (data.error) throw new Error(data.error);
      const changed = data.done !== page.data.done || data.epoch !== page.data.epoch || data.running !== page.data.running;
      take(data);
      if (changed) refresh(); else { head(); cards(); }
    } catch (error) {
      const state = document.getElementById("state");
      state.className = "pill bad";
      state.textContent = `not reached: ${error.message}`;
    }
  }
  setTimeout(follow, EVERY);
}
