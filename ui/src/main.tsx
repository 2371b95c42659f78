// Starts the page.
import { render } from "preact";
import { start } from "./state";
import { App } from "./view/app";

const root = document.getElementById("app");
if (root === null) throw new Error("index.html has an element of id `app`");
render(<App />, root);
void start();
