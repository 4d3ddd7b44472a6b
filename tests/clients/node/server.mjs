// The real binary as a test sees it: started on a free port, stopped by SIGTERM.

import { spawn } from "node:child_process";
import { once } from "node:events";
import path from "node:path";

const repository = path.resolve(import.meta.dirname, "../../..");
const target = process.env.CARGO_TARGET_DIR ?? path.join(repository, "target");
const binary = process.env.WINDROSE_BINARY ?? path.join(target, "release/windrose");

/** Starts `windrose serve` and resolves to its base URL and a function that ends it and gives its exit status. */
export async function startServer(...flags) {
  const server = spawn(binary, ["serve", "--port", "0", "--drain-grace-s", "0", ...flags]);
  const url = await new Promise((resolve, reject) => {
    let output = "";
    const read = (data) => {
      output += data;
      const address = output.match(/http:\/\/127\.0\.0\.1:\d+/);
      if (address) resolve(address[0]);
    };
    server.stdout.on("data", read);
    server.stderr.on("data", read);
    server.on("exit", () => reject(new Error(`the server ended early: ${output}`)));
  });
  const stop = async () => {
    const ended = once(server, "exit");
    server.kill("SIGTERM");
    return (await ended)[0];
  };
  return { url, stop };
}
