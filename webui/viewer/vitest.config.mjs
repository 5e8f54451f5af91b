// The unit tests: pure modules and the page scripts in a simulated DOM. The pages in a real browser: tests/browser.
import { defineConfig } from "vitest/config";

export default defineConfig({
  test: { environment: "happy-dom", include: ["tests/**/*.test.ts"], restoreMocks: true, unstubGlobals: true, css: false },
});
