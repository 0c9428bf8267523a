// What was asked for.
function settingsSection() {
  section("asked", () => "Settings of the " + page.data.kind, () => page.data.settings.length > 0, (place) => {
    place.chart.remove();
    place.body.replaceChildren(table(["setting", "value"], page.data.settings, { text: [1] }));
  });
}
