/* Starts the shipped Swagger UI on /docs. Nothing from outside: no validator badge, no top bar, no plugin. */
"use strict";

const viewer = document.getElementById("swagger-ui");

// Swagger UI switches its colours by a class on <html>; we follow the visitor's setting, as app.css does.
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const applyColours = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
applyColours();
dark.addEventListener("change", applyColours);

window.SwaggerUIBundle({
  domNode: viewer,
  url: viewer.dataset.url,
  presets: [window.SwaggerUIBundle.presets.apis],
  validatorUrl: null,
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  tryItOutEnabled: true,
  onComplete: () => {
    // It brings a <main> of its own; a page has one.
    for (const main of viewer.querySelectorAll("main")) main.setAttribute("role", "none");
  },
});
