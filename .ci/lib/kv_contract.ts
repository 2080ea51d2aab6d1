/** The contract of a store on a KV in a file: `kv_contract.ts PATH FOLDER`, on any runtime. */

import process from "node:process";
import { kvStore } from "../../mod.ts";
import { storeContract } from "../stores/contract.ts";
import { kvOpener } from "./kv.ts";

const [path = "", folder = ""] = process.argv.slice(2);
await storeContract(async () => kvStore(await kvOpener(folder)(path)));
