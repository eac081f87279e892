"use strict";
mlalign.start();
